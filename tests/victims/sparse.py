# Has a deleted file of 512 KiB open, which has little but holes: `sparse.py OUTPUT DELETED`.
import os, sys
from telling import rounds

SIZE, AT = 512 << 10, (0, 200 << 10, 508 << 10)
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.unlink(sys.argv[2])
os.ftruncate(file, SIZE)
for n, at in enumerate(AT):
    os.pwrite(file, bytes([n + 1]) * 4096, at)


def wrong():
    is_ = os.fstat(file)
    if is_.st_size != SIZE or is_.st_blocks * 512 > SIZE // 8:
        return "%d bytes, %d blocks" % (is_.st_size, is_.st_blocks)
    for n, at in enumerate(AT):
        if os.pread(file, 4096, at) != bytes([n + 1]) * 4096:
            return "other bytes at %d" % at
    if os.pread(file, 4096, 100 << 10) != bytes(4096):
        return "bytes in a hole"


rounds(sys.argv[1], wrong)
