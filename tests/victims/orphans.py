# A subreaper and processes of sessions and groups that they cannot have had from their parents: `orphans.py OUTPUT`. Each round all of them tell
# their parent, group and session, which must stay what they are.
import ctypes, mmap, os, sys, time
from telling import rounds

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
common = mmap.mmap(-1, 4096)
words = memoryview(common).cast("Q")
root, count = os.getpid(), 7


def member(number, first=lambda: None):
    """Forks one that does what comes `first`, and then answers."""
    if os.fork():
        return
    first()
    at = number * 4
    while True:
        if words[at] != words[0]:
            words[at + 1], words[at + 2], words[at + 3] = os.getppid(), os.getpgrp(), os.getsid(0)
            words[at] = words[0]
        time.sleep(0.002)
        try:
            os.kill(root, 0)
        except ProcessLookupError:
            os._exit(0)


def passing(work):
    """A child does `work` and ends."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    os.waitpid(pid, 0)


def session():
    os.setsid()
    member(1, lambda: member(2))
    member(3, lambda: os.setpgid(0, 0))


def leader():
    os.setsid()
    passing(lambda: member(5))


def group():
    os.setpgid(0, 0)
    member(6)


passing(session)
member(4, leader)
passing(group)
# A leader that has ended, and is not waited for.
zombie = os.fork()
if zombie == 0:
    os.setsid()
    member(7)
    os._exit(0)


def told():
    words[0] += 1
    for _ in range(5000):
        if all(words[n * 4] == words[0] for n in range(1, count + 1)):
            break
        time.sleep(0.001)
    return [tuple(words[n * 4 : n * 4 + 4]) for n in range(1, count + 1)]


# Until all have the parent that they keep.
while sum(member[1] == root for member in told()) < count - 1:
    time.sleep(0.01)
first = [member[1:] for member in told()]


def wrong():
    if os.getsid(zombie) != zombie or not os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        return "the zombie is none, or leads no session"
    now = told()
    if now != [(words[0], *member) for member in first]:
        return "%s, first %s" % (now, first)


rounds(sys.argv[1], wrong)
