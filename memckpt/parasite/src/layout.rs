// The segment that memckpt and its parasite share. Compiled into both: `memckpt/src/target/blob.rs` includes this file.

use core::mem::{offset_of, size_of};
use core::sync::atomic::AtomicU32;

/// Bytes reserved for the code, which starts at offset 0.
pub const CODE_LEN: usize = 0x3000;
/// Where [`Parameters`] lie.
pub const PARAMETERS: usize = 0x3000;
/// Where the thread's extended state is saved on entry.
pub const XSAVE: usize = 0x4000;
/// Room for the extended state and the magic word behind it.
pub const XSAVE_LEN: usize = 0x2000;
/// One past the parasite's stack, which starts where the extended state ends.
pub const STACK_TOP: usize = 0xa000;
/// The list of [`IoVec`]s of a batch.
pub const IOVECS: usize = 0xa000;
/// How many there can be.
pub const IOVEC_MAX: usize = 4096;
/// The [`Call`]s of a batch; in the place of the iovecs, as the two are never in use at once.
pub const CALLS: usize = IOVECS;
/// How many there can be.
pub const CALL_MAX: usize = 256;
/// What the calls read and write.
pub const DATA: usize = CALLS + CALL_MAX * size_of::<Call>();
/// Room for it.
pub const DATA_LEN: usize = UNDO - DATA;
/// The [`Call`]s that undo what others have set: made before anything is closed, by whoever ends the parasite's work.
pub const UNDO: usize = IOVECS + IOVEC_MAX * size_of::<IoVec>();
/// How many there can be.
pub const UNDO_MAX: usize = 240;
/// What they read.
pub const UNDO_DATA: usize = UNDO + UNDO_MAX * size_of::<Call>();
/// Room for it.
pub const UNDO_DATA_LEN: usize = 0x400;
/// Length of the whole segment.
pub const SEGMENT_LEN: usize = UNDO_DATA + UNDO_DATA_LEN;
/// Most pipes that can be in use.
pub const PIPE_MAX: usize = 16;

/// First word of [`Parameters`]: a segment of this version of the layout ("memckpt" and a number).
pub const MAGIC: u64 = u64::from_le_bytes(*b"memckpt3");

/// [`Parameters::state`] once the parasite listens.
pub const STATE_READY: u32 = 1;

/// The low byte of [`Parameters::command`]; the rest counts up, so that no two commands in a row are equal.
pub mod op {
    /// Create `pipe_count` pipes.
    pub const PIPES: u32 = 1;
    /// Fill the pipes from `batch_first` on, `batch_len` of them; stops at the first short one.
    pub const SPLICE: u32 = 2;
    /// Create a userfaultfd.
    pub const USERFAULTFD: u32 = 3;
    /// Close every descriptor.
    pub const CLOSE: u32 = 4;
    /// Unmap `unmap`.
    pub const UNMAP: u32 = 5;
    /// Close every descriptor and build the frame home, then go on listening.
    pub const HOME: u32 = 6;
    /// Make the first `call_count` system calls of the list.
    pub const CALLS: u32 = 7;
}

/// A system call to make, and what it returned.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    pub number: u64,
    pub args: [u64; 6],
    pub result: i64,
}

/// struct iovec.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IoVec {
    pub base: u64,
    pub len: u64,
}

/// A pipe and its part of the batch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Pipe {
    /// Descriptors in the target; -1: none.
    pub read_end: i32,
    pub write_end: i32,
    /// Its iovecs.
    pub first: u32,
    pub count: u32,
    /// What these amount to in bytes, and what vmsplice said.
    pub wanted: u64,
    pub spliced: i64,
}

/// struct user_regs_struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub bp: u64,
    pub bx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub ax: u64,
    pub cx: u64,
    pub dx: u64,
    pub si: u64,
    pub di: u64,
    pub orig_ax: u64,
    pub ip: u64,
    pub cs: u64,
    pub flags: u64,
    pub sp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// All that the parasite knows. Filled before the commit; later only the atomics and what a command says change.
#[repr(C)]
pub struct Parameters {
    pub magic: u64,
    /// The SysV segment.
    pub shmid: i32,
    pub padding: u32,
    /// When the process that made it started (clock ticks since boot); the segment itself knows its ID.
    pub creator_start: u64,
    /// A robust futex that memckpt holds: its death sets FUTEX_OWNER_DIED and wakes the parasite.
    pub lock: AtomicU32,
    pub command: AtomicU32,
    /// The last command done.
    pub state: AtomicU32,
    pub restart_block: u32,
    /// Node of memckpt's robust list; an address in memckpt.
    pub robust_node: [u64; 2],
    /// Where the segment lies in the target.
    pub address: u64,
    pub length: u64,
    /// `syscall; ret` and a call of rt_sigreturn, both in the target's own text.
    pub syscall_gadget: u64,
    pub sigreturn_gadget: u64,
    /// Where the frame home goes, and the extended state in it (64-byte aligned).
    pub frame: u64,
    pub frame_xsave: u64,
    pub signal_mask: u64,
    pub xfeatures: u64,
    /// Bytes of extended state, without the magic word.
    pub xsave_len: u64,
    pub registers: Registers,
    /// The `syscall` instruction to repeat, or 0.
    pub restart_ip: u64,
    pub saved_sp: u64,
    pub restart_result: i64,
    /// What the last command, and shmctl(IPC_RMID), said.
    pub result: i64,
    pub rmid_result: i64,
    pub unmap: IoVec,
    pub pipe_count: u32,
    pub batch_first: u32,
    pub batch_len: u32,
    pub userfaultfd: i32,
    /// Set once a later memckpt has put the thread back that was left in here: nothing runs in the segment any more.
    pub adopted: u32,
    pub call_count: u32,
    pub undo_count: u32,
    pub padding_undo: u32,
    pub pipes: [Pipe; PIPE_MAX],
}

const _: () = assert!(PARAMETERS + size_of::<Parameters>() <= XSAVE);
const _: () = assert!(XSAVE.is_multiple_of(64) && XSAVE + XSAVE_LEN + 0x4000 <= STACK_TOP);
const _: () = assert!(SEGMENT_LEN.is_multiple_of(4096) && STACK_TOP <= IOVECS);
const _: () = assert!(size_of::<Call>() == 64 && DATA.is_multiple_of(64) && DATA_LEN >= 0x4000);
const _: () = assert!(size_of::<IoVec>() == 16 && size_of::<Pipe>() == 32 && size_of::<Registers>() == 216);
const _: () = assert!(offset_of!(Parameters, lock) == 24 && offset_of!(Parameters, robust_node) == 40);
const _: () = assert!(offset_of!(Parameters, registers) == 128);

/// The frame that rt_sigreturn reads: struct rt_sigframe of the x86-64 kernel without its siginfo.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    /// The return address, popped by the `ret` before rt_sigreturn.
    pub restorer: u64,
    pub uc_flags: u64,
    pub uc_link: u64,
    pub stack_sp: u64,
    pub stack_flags: u64,
    pub stack_size: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub di: u64,
    pub si: u64,
    pub bp: u64,
    pub bx: u64,
    pub dx: u64,
    pub ax: u64,
    pub cx: u64,
    pub sp: u64,
    pub ip: u64,
    pub flags: u64,
    /// cs, gs, fs, ss: 16 bits each.
    pub segments: u64,
    pub err: u64,
    pub trapno: u64,
    pub oldmask: u64,
    pub cr2: u64,
    pub fpstate: u64,
    pub reserved: [u64; 8],
    pub sigmask: u64,
}

const _: () = assert!(offset_of!(Frame, r8) == 8 + 40 && offset_of!(Frame, sigmask) == 8 + 296);

/// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS.
const UC_FLAGS: u64 = 7;
/// No such ss_flags: do_sigaltstack refuses it and rt_sigreturn ignores that, so the alternate stack stays as it is.
pub const NO_STACK_CHANGE: u64 = 0x1234;

impl Frame {
    /// The frame with which rt_sigreturn brings these registers back, `fpstate` being the address of an XSAVE area.
    #[inline]
    pub fn bringing(r: &Registers, restorer: u64, fpstate: u64, sigmask: u64) -> Self {
        Self {
            restorer,
            uc_flags: UC_FLAGS,
            uc_link: 0,
            stack_sp: 1,
            stack_flags: NO_STACK_CHANGE,
            stack_size: 0,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            di: r.di,
            si: r.si,
            bp: r.bp,
            bx: r.bx,
            dx: r.dx,
            ax: r.ax,
            cx: r.cx,
            sp: r.sp,
            ip: r.ip,
            flags: r.flags,
            segments: (r.cs & 0xffff) | (r.ss & 0xffff) << 48,
            err: 0,
            trapno: 0,
            oldmask: 0,
            cr2: 0,
            fpstate,
            reserved: [0; 8],
            sigmask,
        }
    }
}

/// Where struct _fpx_sw_bytes lies in an XSAVE area, its length, and the magic numbers that rt_sigreturn looks for in
/// it and behind the area (arch/x86/include/uapi/asm/sigcontext.h).
pub const SW_RESERVED: usize = 464;
pub const SW_RESERVED_LEN: usize = 48;
pub const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
pub const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// The start of struct _fpx_sw_bytes for `len` bytes of these features, as words.
#[inline]
pub fn sw_reserved(features: u64, len: u64) -> [u32; 5] {
    [FP_XSTATE_MAGIC1, len as u32 + 4, features as u32, (features >> 32) as u32, len as u32]
}
