//! What kind of memory a VMA is, and whether a checkpoint can hold it.

use bitflags::bitflags;

use crate::kernel::maps::Vma;

/// Private memory that the kernel may drop (Linux 6.11); missing in libc.
const MAP_DROPPABLE: i32 = 0x08;

bitflags! {
    /// CRIU's `vma_entry.status`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct VmaStatus: u32 {
        /// Restored by mmap(2).
        const REGULAR = 1;
        /// The vsyscall page.
        const VSYSCALL = 1 << 2;
        /// The vDSO.
        const VDSO = 1 << 3;
        /// Moved by brk(2).
        const HEAP = 1 << 5;
        /// Private mapping of a file.
        const FILE_PRIVATE = 1 << 6;
        /// Shared mapping of a file.
        const FILE_SHARED = 1 << 7;
        /// Shared anonymous memory.
        const ANON_SHARED = 1 << 8;
        /// Private anonymous memory.
        const ANON_PRIVATE = 1 << 9;
        /// A System V segment.
        const SYSVIPC = 1 << 10;
        /// The kernel's variables for the vDSO.
        const VVAR = 1 << 12;
        /// An AIO ring.
        const AIORING = 1 << 13;
        /// A memfd.
        const MEMFD = 1 << 14;
        /// A user shadow stack.
        const SHSTK = 1 << 15;
        /// No area, but a guard region in one (MADV_GUARD_INSTALL); CRIU 4.2.
        const GUARD = 1 << 16;
        /// The page of out-of-line uprobe instructions.
        const UPROBES = 1 << 17;
    }
}

/// What smaps' VmFlags say of a VMA, as far as it matters here (Documentation/filesystems/proc.rst). Bits that
/// memckpt's own tracking sets must not be in here: `uffd` is the target's own userfaultfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one a flag of the kernel's")]
pub struct VmaFacts {
    /// `nl`: non-linear, or remap_file_pages(2) was observed on it.
    pub nonlinear: bool,
    /// `io`: device memory.
    pub io: bool,
    /// `pf`: page frames without struct page.
    pub pfnmap: bool,
    /// `ht`: huge pages of hugetlbfs.
    pub hugetlb: bool,
    /// `um`, `uw`, `ui`: the target registered it with a userfaultfd of its own.
    pub uffd: bool,
    /// `mg`: KSM may merge its pages.
    pub mergeable: bool,
    /// `gd`: grows down.
    pub grows_down: bool,
    /// `lo`: locked.
    pub locked: bool,
    /// `lf`: locked, page by page as they come.
    pub locked_on_fault: bool,
    /// `nr`: no memory is reserved for it (MAP_NORESERVE).
    pub no_reserve: bool,
    /// `dp`: the kernel may drop its pages (MAP_DROPPABLE, Linux 6.11).
    pub droppable: bool,
    /// `wf`: empty in children.
    pub wipe_on_fork: bool,
    /// `ss`: a user shadow stack.
    pub shadow_stack: bool,
}

/// Kinds of private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrivateKind {
    /// Anonymous.
    Anon,
    /// Anonymous, moved by brk(2).
    Heap,
    /// Anonymous, the stack of the process.
    Stack,
    /// A file's, with private copies of written pages.
    File,
    /// Huge pages of hugetlbfs. Dirty tracking does not reach them.
    Hugetlb,
    /// KSM replaces its pages behind the tracker's back.
    Mergeable,
    /// The kernel may drop its pages at any time.
    Droppable,
    /// A user shadow stack.
    ShadowStack,
}

/// Kinds of shared memory that belongs to no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SharedKind {
    /// mmap(2) with MAP_SHARED and MAP_ANONYMOUS, or of `/dev/zero`.
    Anonymous,
    /// memfd_create(2).
    Memfd,
    /// shmget(2).
    SysV,
    /// Huge pages of hugetlbfs.
    Hugetlb,
}

/// Why a VMA cannot be in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// remap_file_pages(2).
    #[error("is a non-linear mapping (remap_file_pages)")]
    Nonlinear,
    /// VM_IO or VM_PFNMAP.
    #[error("maps a device or raw page frames; what is behind them cannot be saved")]
    Device,
    /// A ring of io_uring.
    #[error("is an io_uring ring, which the kernel writes to")]
    IoUring,
    /// The target's own userfaultfd.
    #[error("is registered with the target's own userfaultfd")]
    Userfaultfd,
}

/// What kind of memory a VMA is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmaClass {
    /// Private memory: in the checkpoint.
    Private(PrivateKind),
    /// Shared mapping of a file: the file's business.
    SharedFile,
    /// Shared memory without a file: not in the checkpoint of this process's memory.
    SharedAnon(SharedKind),
    /// The kernel's code for the process; saved whole.
    Vdso,
    /// The kernel's variables; never saved.
    Vvar,
    /// The vsyscall page; never saved.
    Vsyscall,
    /// Instructions of uprobes, out of line; never saved.
    Uprobes,
    /// An AIO ring: the kernel writes to it, so it is saved whole.
    AioRing,
    /// A checkpoint cannot hold it.
    Refused(Refusal),
}

/// What kind of memory `vma` is.
#[must_use]
pub fn classify(vma: &Vma, facts: VmaFacts) -> VmaClass {
    match vma.name.as_str() {
        // Special mappings have names that no path can have; the kernel marks some of them VM_IO or VM_PFNMAP.
        "[vdso]" => return VmaClass::Vdso,
        "[vvar]" | "[vvar_vclock]" => return VmaClass::Vvar,
        "[vsyscall]" => return VmaClass::Vsyscall,
        "[uprobes]" => return VmaClass::Uprobes,
        _ => {}
    }
    if facts.nonlinear {
        return VmaClass::Refused(Refusal::Nonlinear);
    }
    if vma.name.starts_with("anon_inode:[io_uring]") {
        return VmaClass::Refused(Refusal::IoUring);
    }
    if facts.io || facts.pfnmap {
        return VmaClass::Refused(Refusal::Device);
    }
    if facts.uffd {
        return VmaClass::Refused(Refusal::Userfaultfd);
    }
    if vma.is_internal("/[aio]") {
        return VmaClass::AioRing;
    }
    if vma.shared {
        return shared(vma, facts);
    }
    VmaClass::Private(private(vma, facts))
}

fn shared(vma: &Vma, facts: VmaFacts) -> VmaClass {
    if vma.is_memfd() {
        VmaClass::SharedAnon(SharedKind::Memfd)
    } else if vma.is_internal("/SYSV") {
        VmaClass::SharedAnon(SharedKind::SysV)
    } else if vma.is_internal("/dev/zero") || vma.is_internal("[anon_shmem:") {
        VmaClass::SharedAnon(SharedKind::Anonymous)
    } else if facts.hugetlb && vma.is_internal("/anon_hugepage") {
        VmaClass::SharedAnon(SharedKind::Hugetlb)
    } else {
        VmaClass::SharedFile
    }
}

fn private(vma: &Vma, facts: VmaFacts) -> PrivateKind {
    // What forbids inheriting comes first.
    if facts.hugetlb {
        PrivateKind::Hugetlb
    } else if facts.mergeable {
        PrivateKind::Mergeable
    } else if facts.droppable {
        PrivateKind::Droppable
    } else if facts.shadow_stack {
        PrivateKind::ShadowStack
    } else if !vma.is_anonymous() {
        PrivateKind::File
    } else if vma.name == "[heap]" {
        PrivateKind::Heap
    } else if vma.name == "[stack]" {
        PrivateKind::Stack
    } else {
        PrivateKind::Anon
    }
}

impl VmaClass {
    /// CRIU's status bits of `vma`, which is of this class.
    #[must_use]
    pub fn status(self, vma: &Vma) -> VmaStatus {
        let private = if vma.is_anonymous() { VmaStatus::ANON_PRIVATE } else { VmaStatus::FILE_PRIVATE };
        let kind = match self {
            Self::Private(PrivateKind::ShadowStack) => VmaStatus::SHSTK | private,
            Self::Private(_) if vma.name == "[heap]" => VmaStatus::HEAP | private,
            Self::Private(_) if vma.is_memfd() => private | VmaStatus::MEMFD,
            Self::Private(_) => private,
            Self::SharedFile => VmaStatus::FILE_SHARED,
            Self::SharedAnon(SharedKind::Memfd) => VmaStatus::FILE_SHARED | VmaStatus::MEMFD,
            Self::SharedAnon(SharedKind::SysV) => VmaStatus::ANON_SHARED | VmaStatus::SYSVIPC,
            Self::SharedAnon(SharedKind::Anonymous | SharedKind::Hugetlb) => VmaStatus::ANON_SHARED,
            Self::Vdso => VmaStatus::VDSO | VmaStatus::ANON_PRIVATE,
            Self::Vvar => VmaStatus::VVAR | VmaStatus::ANON_PRIVATE,
            Self::Uprobes => VmaStatus::UPROBES | VmaStatus::ANON_PRIVATE,
            Self::AioRing => VmaStatus::AIORING | VmaStatus::ANON_SHARED,
            Self::Vsyscall => return VmaStatus::VSYSCALL | VmaStatus::ANON_PRIVATE,
            Self::Refused(_) => return VmaStatus::empty(),
        };
        VmaStatus::REGULAR | kind
    }

    /// The flags that mmap(2) would make `vma`, which is of this class, with; of droppable memory, MAP_PRIVATE with them.
    #[must_use]
    pub fn map_flags(self, vma: &Vma, facts: VmaFacts) -> u32 {
        let of_file = !vma.is_anonymous()
            && !matches!(self, Self::SharedAnon(SharedKind::Anonymous | SharedKind::SysV));
        let flags = [
            (vma.shared, libc::MAP_SHARED),
            (!vma.shared, libc::MAP_PRIVATE),
            (!of_file, libc::MAP_ANONYMOUS),
            (facts.grows_down, libc::MAP_GROWSDOWN),
            (facts.locked, libc::MAP_LOCKED),
            (facts.no_reserve, libc::MAP_NORESERVE),
            (facts.droppable, MAP_DROPPABLE),
            (facts.hugetlb, libc::MAP_HUGETLB),
        ];
        flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | *flag as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::AddrRange;
    use crate::kernel::maps::Prot;

    fn vma(name: &str, shared: bool, dev: (u32, u32), inode: u64) -> Vma {
        Vma {
            range: AddrRange::new(0x1000, 0x2000),
            prot: Prot::READ | Prot::WRITE,
            shared,
            offset: 0,
            dev,
            inode,
            name: name.to_owned(),
        }
    }

    #[test]
    fn names_of_the_kernel_are_known() {
        use VmaClass as C;
        let none = (0, 0);
        let of = |name, shared, dev, inode| classify(&vma(name, shared, dev, inode), VmaFacts::default());
        assert_eq!(of("", false, none, 0), C::Private(PrivateKind::Anon));
        assert_eq!(of("[heap]", false, none, 0), C::Private(PrivateKind::Heap));
        assert_eq!(of("[stack]", false, none, 0), C::Private(PrivateKind::Stack));
        assert_eq!(of("[anon:glibc: malloc]", false, none, 0), C::Private(PrivateKind::Anon));
        assert_eq!(of("/usr/lib/x.so", false, (8, 1), 5), C::Private(PrivateKind::File));
        assert_eq!(of("/usr/lib/x.so", true, (8, 1), 5), C::SharedFile);
        assert_eq!(of("/dev/zero (deleted)", true, (0, 1), 5), C::SharedAnon(SharedKind::Anonymous));
        assert_eq!(of("/SYSV00000000 (deleted)", true, (0, 1), 5), C::SharedAnon(SharedKind::SysV));
        assert_eq!(of("/SYSV00000000 (deleted)", true, (0, 1), 0), C::SharedAnon(SharedKind::SysV));
        assert_eq!(of("/memfd:x (deleted)", true, (0, 1), 5), C::SharedAnon(SharedKind::Memfd));
        assert_eq!(of("/memfd:x (deleted)", false, (0, 1), 5), C::Private(PrivateKind::File));
        assert_eq!(of("/SYSV00000000 (deleted)", true, (8, 1), 5), C::SharedFile);
        assert_eq!(of("/[aio] (deleted)", true, (0, 14), 5), C::AioRing);
        assert_eq!(of("anon_inode:[io_uring]", true, (0, 14), 5), C::Refused(Refusal::IoUring));
        assert_eq!(of("[vvar_vclock]", false, none, 0), C::Vvar);
    }

    #[test]
    fn what_a_checkpoint_cannot_hold_is_refused_but_not_the_kernels_own() {
        let io = VmaFacts { io: true, pfnmap: true, ..Default::default() };
        assert_eq!(classify(&vma("[vvar]", false, (0, 0), 0), io), VmaClass::Vvar);
        let device = vma("/dev/mem", true, (0, 6), 7);
        assert_eq!(classify(&device, io), VmaClass::Refused(Refusal::Device));
        let anon = vma("", false, (0, 0), 0);
        let refused = |facts| classify(&anon, facts);
        assert_eq!(
            refused(VmaFacts { nonlinear: true, ..Default::default() }),
            VmaClass::Refused(Refusal::Nonlinear)
        );
        assert_eq!(
            refused(VmaFacts { uffd: true, ..Default::default() }),
            VmaClass::Refused(Refusal::Userfaultfd)
        );
    }

    /// Status and flags as CRIU wrote them for a real process.
    #[test]
    fn status_and_flags_are_those_of_criu() {
        let check = |vma: &Vma, facts, status, flags| {
            let class = classify(vma, facts);
            assert_eq!((class.status(vma), class.map_flags(vma, facts)), (status, flags), "{vma:?}");
        };
        use VmaStatus as S;
        let none = VmaFacts::default();
        check(&vma("[heap]", false, (0, 0), 0), none, S::REGULAR | S::HEAP | S::ANON_PRIVATE, 0x22);
        check(&vma("/bin/x", false, (8, 1), 3), none, S::REGULAR | S::FILE_PRIVATE, 2);
        check(&vma("/memfd:x (deleted)", true, (0, 1), 3), none, S::REGULAR | S::FILE_SHARED | S::MEMFD, 1);
        check(&vma("[vdso]", false, (0, 0), 0), none, S::REGULAR | S::VDSO | S::ANON_PRIVATE, 0x22);
        check(&vma("[vvar]", false, (0, 0), 0), none, S::REGULAR | S::VVAR | S::ANON_PRIVATE, 0x22);
        check(&vma("[vsyscall]", false, (0, 0), 0), none, S::VSYSCALL | S::ANON_PRIVATE, 0x22);
        let stack = VmaFacts { grows_down: true, ..none };
        check(&vma("[stack]", false, (0, 0), 0), stack, S::REGULAR | S::ANON_PRIVATE, 0x122);
        let sparse = VmaFacts { no_reserve: true, ..none };
        check(&vma("", false, (0, 0), 0), sparse, S::REGULAR | S::ANON_PRIVATE, 0x4022);
    }
}
