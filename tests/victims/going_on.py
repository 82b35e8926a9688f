# As going_on.c, in Python: threads that count, a timer that ticks, a pipe with something in it, a deleted file that is open.
import os, signal, sys, threading, time

output, deleted = sys.argv[1:]
ticks = 0


def tick(*_):
    global ticks
    ticks += 1


def tell(number, error=None):
    with open(output, "a") as f:
        f.write(f"{number} error {error}\n" if error else f"{number} ok\n")
    if error:
        os._exit(4)


signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
reading, writing = os.pipe()
file = open(deleted, "w+")
file.write("kept " * 1000)
file.flush()
os.unlink(deleted)
counts = [0] * 4


def count(me):
    while True:
        counts[me] += 1
        time.sleep(0.002)


for me in range(4):
    threading.Thread(target=count, args=(me,), daemon=True).start()
os.write(writing, b"before 0")
number = 0
while True:
    number += 1
    before, ticked = list(counts), ticks
    deadline = time.monotonic() + 30
    while any(a == b for a, b in zip(counts, before)) or ticks == ticked:
        if time.monotonic() > deadline:
            tell(number, "a thread or the timer stands still")
        time.sleep(0.005)
    expected = b"before %d" % (number - 1)
    if os.read(reading, 100) != expected:
        tell(number, "the pipe held something else")
    os.write(writing, b"before %d" % number)
    file.seek(0)
    if file.read() != "kept " * 1000:
        tell(number, "the deleted file holds something else")
    tell(number)
