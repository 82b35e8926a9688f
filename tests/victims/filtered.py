# Is under a seccomp filter by which getppid() fails with errno 95: `filtered.py OUTPUT`. Each round writes `N ok` to OUTPUT, or what is wrong.
import ctypes, struct, sys
import telling

GETPPID = 110
libc = ctypes.CDLL(None, use_errno=True)
# Load the number of the call; getppid: errno 95; else allow.
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, GETPPID, 0x06, 0, 0, 0x00050000 | 95, 0x06, 0, 0, 0x7FFF0000)
instructions = ctypes.create_string_buffer(program, len(program))
descriptor = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
# PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with SECCOMP_MODE_FILTER
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, descriptor, 0, 0):
    sys.exit("prctl: errno %d" % ctypes.get_errno())


def wrong():
    if libc.syscall(GETPPID) != -1 or ctypes.get_errno() != 95:
        return "getppid is allowed"
    status = open("/proc/self/status").read()
    if "Seccomp:\t2\n" not in status or "Seccomp_filters:\t1\n" not in status:
        return "another filter"


telling.rounds(sys.argv[1], wrong)
