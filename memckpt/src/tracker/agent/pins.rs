//! Whether an mm ever had a page pinned (MMF_HAS_PINNED in `mm_struct.flags`).
//!
//! clear_refs leaves a writable page that is pinned as dirty as it was, but only in an mm with this flag
//! (pte_is_pinned, fs/proc/task_mmu.c, since 5.12). The kernel sets it before it pins (mm_set_has_pinned_flag,
//! mm/gup.c, since 5.11) and never takes it back. So where it is not set *after* a clear, that clear left nothing out.

use super::bitmap::ControlPage;
use super::capture::{Captured, capture};
use crate::kernel::memory::vm_read;
use crate::kernel::puppet::Puppet;

/// The flag's bit, which differs from kernel to kernel and is in no type information.
#[derive(Clone, Copy, Debug)]
pub(super) struct PinnedFlag(u64);

impl PinnedFlag {
    /// Pins a page of a child and looks which flag that sets. `None` where it is not clear which.
    pub(super) fn find(control: &ControlPage) -> Option<Self> {
        let puppet = Puppet::start().ok()?;
        let page = puppet.map(crate::addr::PAGE_SIZE).ok()?;
        puppet.fill(page, 1).ok()?;
        let before = capture(control, puppet.pid()).ok()?;
        // process_vm_rw_single_vec pins what it copies (mm/process_vm_access.c, since 5.6).
        vm_read(puppet.pid(), &[page], &mut [0; 8]).ok()?;
        let after = capture(control, puppet.pid()).ok()?;
        let set = after.flags & !before.flags;
        let same = before.mm == after.mm && before.flags & !after.flags == 0;
        (same && set.is_power_of_two()).then_some(Self(set))
    }

    pub(super) const fn is_set(self, of: &Captured) -> bool {
        of.flags & self.0 != 0
    }
}
