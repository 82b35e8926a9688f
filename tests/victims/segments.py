# A parent and its child, and two System V segments that both have attached: one with a key, the other removed. `segments.py OUTPUT` writes the
# number of the first to OUTPUT.segment. Each round the child answers in both what the parent has asked in the first.
import ctypes, os, signal, sys, time
from telling import rounds

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE, CREATE, EXCLUSIVE, REMOVE, STAT = 4096, 0o1000, 0o2000, 0, 2
key = 0x6D630000 | os.getpid() & 0xFFFF


def attached(id):
    at = libc.shmat(id, None, 0)
    if at is None or at == 2**64 - 1:
        sys.exit("shmat: " + os.strerror(ctypes.get_errno()))
    return at, (ctypes.c_uint64 * (2 * PAGE // 8)).from_address(at)


keyed = libc.shmget(key, 3 * PAGE - 100, CREATE | EXCLUSIVE | 0o640)
with open(sys.argv[1] + ".segment", "w") as file:
    file.write(str(keyed))
at, common = attached(keyed)
nameless = libc.shmget(0, 2 * PAGE, CREATE | 0o600)
_, second = attached(nameless)
libc.shmctl(nameless, REMOVE, None)
# One attachment, two areas.
libc.mprotect(at + 2 * PAGE, PAGE, 1)
common[1000] = 0x1234567890ABCDEF

parent = os.getpid()
if os.fork() == 0:
    libc.prctl(1, signal.SIGKILL)
    while os.getppid() == parent:
        if common[1] != common[0]:
            second[513] = common[0]
            common[1] = common[0]
        time.sleep(0.001)
    sys.exit()


def state(id):
    buffer = ctypes.create_string_buffer(112)
    if libc.shmctl(id, STAT, buffer) != 0:
        return os.strerror(ctypes.get_errno())
    word = lambda at, size: int.from_bytes(buffer.raw[at : at + size], "little")
    return {"key": word(0, 4), "mode": word(20, 4), "size": word(48, 8), "attached": word(88, 8)}


states = state(keyed), state(nameless)


def wrong():
    common[0] += 1
    for _ in range(5000):
        if common[1] == common[0]:
            break
        time.sleep(0.001)
    if not common[0] == common[1] == second[513] or common[1000] != 0x1234567890ABCDEF:
        return "%s" % [common[0], common[1], second[513], common[1000]]
    if (state(keyed), state(nameless)) != states:
        return "%s" % [state(keyed), state(nameless), states]
    if libc.shmget(key, 0, 0) != keyed:
        return "another segment has the key"
    again, same = attached(keyed)
    right = same[0] == common[0]
    libc.shmdt(again)
    return None if right else "attached again, it is another"


rounds(sys.argv[1], wrong)
