# 32 threads, each with a buffer of KIB KiB that it turns and checks: `buffers.py OUTPUT KIB`. Each round writes `N ok` to OUTPUT, or `N error`.
import hashlib, itertools, os, sys, threading

buffers = [bytearray(os.urandom(1024) * int(sys.argv[2])) for _ in range(32)]
sums = [hashlib.sha1(buffer).digest() for buffer in buffers]
wrong = []
barrier = threading.Barrier(len(buffers) + 1)


def work(n):
    while True:
        barrier.wait()
        if hashlib.sha1(buffers[n]).digest() != sums[n]:
            wrong.append(n)
        buffers[n][:] = buffers[n][1:] + buffers[n][:1]
        sums[n] = hashlib.sha1(buffers[n]).digest()
        barrier.wait()


for n in range(len(buffers)):
    threading.Thread(target=work, args=(n,), daemon=True).start()
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in itertools.count(1):
    barrier.wait()
    barrier.wait()
    os.write(out, b"%d %s\n" % (number, b"error" if wrong else b"ok"))
