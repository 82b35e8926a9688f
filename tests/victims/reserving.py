# Has a private area and a shared one of 1 TiB each, for which no memory is reserved, with words in a few pages: `reserving.py OUTPUT`. A child
# shares both.
import ctypes, os, sys, time
from telling import rounds

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
SIZE, SHARED, PRIVATE = 1 << 40, 0x01, 0x02
AT = [0, 1 << 30, (1 << 39) + 4096, SIZE - 8]


def area(sharing):
    at = libc.mmap(None, SIZE, 3, sharing | 0x20 | 0x4000, -1, 0)  # MAP_ANONYMOUS, MAP_NORESERVE
    if at is None or at == 2**64 - 1:
        sys.exit("mmap: " + os.strerror(ctypes.get_errno()))
    return [ctypes.c_uint64.from_address(at + offset) for offset in AT]


private, shared = area(PRIVATE), area(SHARED)
for n, word in enumerate(private + shared):
    word.value = 1000 + n
root = os.getpid()
if os.fork() == 0:
    libc.prctl(1, 9)
    while os.getppid() == root:
        if [word.value for word in private] == [1000, 1001, 1002, 1003]:
            shared[3].value = shared[2].value
        time.sleep(0.001)
    os._exit(0)


def wrong():
    shared[2].value += 1
    for _ in range(5000):
        if shared[3].value == shared[2].value:
            break
        time.sleep(0.001)
    words = [word.value for word in private + shared]
    if words != [1000, 1001, 1002, 1003, 1004, 1005, shared[2].value, shared[2].value]:
        return "%s" % words


rounds(sys.argv[1], wrong)
