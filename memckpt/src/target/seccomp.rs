//! What a thread's seccomp filters would say to the calls that the parasite makes: a killed parasite is a killed target.

use libc::sock_filter;

use super::blob::SEGMENT_LEN;
use crate::kernel::SyscallError;
use crate::kernel::ptrace;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const SECCOMP_RET_ALLOW: u32 = 0x7fff_0000;
const SECCOMP_RET_LOG: u32 = 0x7ffc_0000;
const SECCOMP_RET_ACTION: u32 = 0xffff_0000;
/// BPF_MAXINSNS
const STEPS_MAX: usize = 4096;

/// struct seccomp_data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) ip: u64,
    pub(super) args: [u64; 6],
}

/// The calls of the parasite, whose code lies at `address`, with the arguments that a filter could look at.
pub(super) fn calls(address: u64, syscall_gadget: u64, sigreturn_gadget: u64) -> Vec<Call> {
    let len = SEGMENT_LEN as u64;
    let from = |ip, number, args: [u64; 6]| Call { number, ip, args };
    let blob = |number, args| from(address, number, args);
    vec![
        from(syscall_gadget, libc::SYS_shmat, [1, address, libc::SHM_EXEC as u64, 0, 0, 0]),
        blob(libc::SYS_rt_sigprocmask, [2, address, 0, 8, 0, 0]),
        blob(libc::SYS_shmctl, [1, 0, 0, 0, 0, 0]),
        blob(libc::SYS_madvise, [address, len, libc::MADV_DONTFORK as u64, 0, 0, 0]),
        blob(libc::SYS_futex, [address, libc::FUTEX_WAIT as u64, 1, 0, 0, 0]),
        blob(libc::SYS_futex, [address, libc::FUTEX_WAKE as u64, 1, 0, 0, 0]),
        blob(libc::SYS_pipe2, [address, libc::O_CLOEXEC as u64, 0, 0, 0, 0]),
        blob(libc::SYS_vmsplice, [3, address, 1, u64::from(libc::SPLICE_F_NONBLOCK), 0, 0]),
        blob(libc::SYS_close, [3, 0, 0, 0, 0, 0]),
        blob(libc::SYS_rt_sigpending, [address, 8, 0, 0, 0, 0]),
        blob(libc::SYS_rt_sigaction, [1, 0, address, 8, 0, 0]),
        blob(libc::SYS_restart_syscall, [0; 6]),
        from(syscall_gadget, libc::SYS_munmap, [address, len, 0, 0, 0, 0]),
        from(sigreturn_gadget, libc::SYS_rt_sigreturn, [0; 6]),
    ]
}

/// The filters of a stopped thread that has some.
pub(super) fn filters(tid: i32) -> Result<Vec<Vec<sock_filter>>, SyscallError> {
    let mut filters = Vec::new();
    while let Some(filter) = ptrace::seccomp_filter(tid, filters.len())? {
        filters.push(filter);
    }
    Ok(filters)
}

/// The number of the first call that the filters do not simply allow.
pub(super) fn forbidden(filters: &[Vec<sock_filter>], calls: &[Call]) -> Option<i64> {
    calls.iter().find(|call| !allowed(filters, call)).map(|call| call.number)
}

/// Whether the filters simply allow a call.
pub(super) fn allowed(filters: &[Vec<sock_filter>], call: &Call) -> bool {
    filters.iter().all(|filter| allows(filter, call))
}

/// Whether this filter lets the call happen. One that we cannot follow does not.
fn allows(filter: &[sock_filter], call: &Call) -> bool {
    let action = run(filter, call).map(|ret| ret & SECCOMP_RET_ACTION);
    matches!(action, Some(SECCOMP_RET_ALLOW | SECCOMP_RET_LOG))
}

/// The 32-bit word at `offset` of struct seccomp_data.
fn load(call: &Call, offset: u32) -> Option<u32> {
    let half = |value: u64| if offset.is_multiple_of(8) { value as u32 } else { (value >> 32) as u32 };
    match offset {
        0 => Some(call.number as u32),
        4 => Some(AUDIT_ARCH_X86_64),
        8 | 12 => Some(half(call.ip)),
        16..64 if offset.is_multiple_of(4) => Some(half(call.args[(offset as usize - 16) / 8])),
        _ => None,
    }
}

/// Classic BPF (include/uapi/linux/bpf_common.h), the subset of seccomp_check_filter.
fn run(filter: &[sock_filter], call: &Call) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0u32, 0u32, [0u32; 16]);
    let mut at = 0usize;
    for _ in 0..STEPS_MAX {
        let op = filter.get(at)?;
        at += 1;
        let k = op.k;
        let slot = (k as usize).min(15);
        let operand = if op.code & 0x08 == 0 { k } else { x };
        match op.code & 0x07 {
            // BPF_LD, BPF_LDX
            class @ (0 | 1) => {
                let value = match op.code & 0xe0 {
                    0x00 => k,
                    0x20 if class == 0 => load(call, k)?,
                    0x60 => memory[slot],
                    0x80 => 64,
                    _ => return None,
                };
                if class == 0 { a = value } else { x = value }
            }
            2 => memory[slot] = a,
            3 => memory[slot] = x,
            4 => {
                a = match op.code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    // A division by zero returns 0, which is to kill.
                    0x30 => a.checked_div(operand)?,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.wrapping_shl(operand),
                    0x70 => a.wrapping_shr(operand),
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                }
            }
            5 => {
                let taken = match op.code & 0xf0 {
                    0x00 => {
                        at = at.checked_add(k as usize)?;
                        continue;
                    }
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if taken { op.jt } else { op.jf });
            }
            // BPF_RET with a constant or A
            6 => return Some(if op.code & 0x18 == 0x10 { a } else { k }),
            // BPF_TAX, BPF_TXA
            _ => {
                if op.code & 0xf8 == 0x80 {
                    a = x;
                } else {
                    x = a;
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
        sock_filter { code, jt, jf, k }
    }

    fn call(number: i64) -> Call {
        Call { number, ip: 0x1_0000_2000, args: [7, 0xaaaa_bbbb_cccc_dddd, 0, 0, 0, 9] }
    }

    const LOAD: u16 = 0x20;
    const JEQ: u16 = 0x15;
    const RET: u16 = 0x06;

    #[test]
    fn a_denied_number_is_seen() {
        let deny_shmat = [
            op(LOAD, 0, 0, 0),
            op(JEQ, 0, 1, 30),
            op(RET, 0, 0, 0x0005_0001),
            op(RET, 0, 0, SECCOMP_RET_ALLOW),
        ];
        assert!(!allows(&deny_shmat, &call(30)));
        assert!(allows(&deny_shmat, &call(11)));
    }

    #[test]
    fn every_field_can_be_read() {
        let word = |offset| run(&[op(LOAD, 0, 0, offset), op(0x16, 0, 0, 0)], &call(30));
        assert_eq!(word(0), Some(30));
        assert_eq!(word(4), Some(AUDIT_ARCH_X86_64));
        assert_eq!((word(8), word(12)), (Some(0x2000), Some(1)));
        assert_eq!((word(24), word(28)), (Some(0xcccc_dddd), Some(0xaaaa_bbbb)));
        assert_eq!((word(56), word(64), word(2)), (Some(9), None, None));
    }

    #[test]
    fn arithmetic_memory_and_jumps_as_in_the_kernel() {
        let program = [
            op(0x00, 0, 0, 6), // A = 6
            op(0x02, 0, 0, 3), // M[3] = A
            op(0x07, 0, 0, 0), // X = A
            op(0x24, 0, 0, 7), // A *= 7
            op(0x1c, 0, 0, 0), // A -= X
            op(0x61, 0, 0, 3), // X = M[3]
            op(0x3c, 0, 0, 0), // A /= X
            op(0x25, 0, 1, 5), // A > 5 ?
            op(0x05, 0, 0, 1), // over the next
            op(RET, 0, 0, 1),
            op(0x16, 0, 0, 0), // return A
        ];
        assert_eq!(run(&program, &call(0)), Some(6));
    }

    #[test]
    fn what_cannot_be_followed_is_forbidden() {
        assert!(!allows(&[], &call(0)));
        assert!(!allows(&[op(0x05, 0, 0, u32::MAX)], &call(0)));
        assert!(!allows(&[op(0x30, 0, 0, 0)], &call(0)));
        assert!(!allows(&[op(0x34, 0, 0, 0), op(RET, 0, 0, SECCOMP_RET_ALLOW)], &call(0)));
    }
}
