# A parent and three children that share 64 MiB, of which each child has written a part: `sharing.py OUTPUT`. The parent writes the children's
# PIDs to OUTPUT.children, and from then on `N ok` to OUTPUT.
import ctypes, itertools, mmap, os, signal, sys, time

MIB = 1 << 20
memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
# MADV_NOHUGEPAGE: what is copied is single pages.
memory.madvise(15)
for at in range(0, 64 * MIB, 4096):
    memory[at : at + 8] = at.to_bytes(8, "little")
# Not to be joined with its neighbours.
ready, told = os.pipe()
children = []
for n in range(1, 4):
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        for at in range(0, n * MIB, 4096):
            memory[at : at + 8] = n.to_bytes(8, "little")
        os.write(told, b"x")
        while True:
            time.sleep(100)
    children.append(child)
for _ in children:
    os.read(ready, 1)
with open(sys.argv[1] + ".children", "w") as file:
    file.write(" ".join(map(str, children)))
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in itertools.count(1):
    right = all(memory[at : at + 8] == at.to_bytes(8, "little") for at in range(0, 64 * MIB, 37 * 4096))
    os.write(out, b"%d %s\n" % (number, b"ok" if right else b"error"))
    time.sleep(0.02)
