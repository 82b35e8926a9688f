# Areas in every state that mmap(2), madvise(2), mprotect(2) and mlock(2) give them, and a process with settings of its own: `states.py OUTPUT`.
# Each round all is what it was at first.
import ctypes, os, resource, sys
from telling import rounds

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
PAGE, PAGES, HUGE = 4096, 16, 2 << 20
ANONYMOUS, GROWSDOWN = 0x22, 0x100
areas, guards = {}, []


def area(name, flags=ANONYMOUS, prot=3, fd=-1, size=PAGES * PAGE):
    """With a page between it and whatever comes next, so that none are merged."""
    room = libc.mmap(None, size + 2 * PAGE + HUGE, 0, ANONYMOUS, -1, 0)
    at = (room + PAGE + HUGE - 1) // HUGE * HUGE if size >= HUGE else room + PAGE
    if libc.mmap(at, size, prot, flags | 0x10, fd, 0) != at:
        return None
    if prot & 2:
        ctypes.memset(at, len(areas) + 1, size)
    areas[name] = at
    return at


def advised(name, advice):
    if libc.madvise(area(name), PAGES * PAGE, advice):
        print("no advice %d: %s" % (advice, os.strerror(ctypes.get_errno())), file=sys.stderr)


def guarded(name, **how):
    """Installs guard regions, if the kernel has them."""
    at = area(name, **how)
    for first, count in (0, 1), (5, 3), (15, 1):
        if libc.madvise(at + first * PAGE, count * PAGE, 102) == 0:  # MADV_GUARD_INSTALL
            guards.extend(at + page * PAGE for page in range(first, first + count))
    return at


for name, advice in dict(sequential=2, random=1, apart=10, alike=12, empty_in_children=18, undumped=16, small=15).items():
    advised(name, advice)
at = area("huge", prot=0, size=2 * HUGE)
libc.madvise(at, 2 * HUGE, 14)
libc.mprotect(at, 2 * HUGE, 3)
ctypes.memset(at, 1, 2 * HUGE)
area("downwards", flags=ANONYMOUS | GROWSDOWN)
area("droppable", flags=0x28)  # MAP_DROPPABLE
area("unreserved", flags=ANONYMOUS | 0x4000)
area("shared", flags=0x21)
at = area("with a wall")
libc.mprotect(at + 3 * PAGE, PAGE, 0)
areas["the wall"] = at + 3 * PAGE
libc.mprotect(area("read only"), PAGES * PAGE, 1)
libc.mprotect(area("code"), PAGES * PAGE, 5)
libc.mlock2(area("locked"), PAGES * PAGE, 0)
libc.mlock2(area("locked when it comes"), PAGES * PAGE, 1)
guarded("guarded")
libc.mlock2(guarded("guarded and locked"), PAGES * PAGE, 1)
file = os.open(sys.argv[1] + ".bytes", os.O_RDWR | os.O_CREAT)
os.write(file, bytes(PAGES * PAGE))
guarded("guarded file", flags=2, fd=file)
area("file", flags=2, fd=file, prot=1)
os.close(file)

# A child has what is not kept from it, and guards of its own.
parent = os.getpid()
if os.fork() == 0:
    if guards:
        libc.madvise(areas["guarded"], PAGE, 103)  # MADV_GUARD_REMOVE
        ctypes.memset(areas["guarded"], 1, PAGE)
        libc.madvise(areas["guarded"] + 2 * PAGE, PAGE, 102)
        guards = [guard for guard in guards if guard != areas["guarded"]] + [areas["guarded"] + 2 * PAGE]
    areas.pop("apart")
    sys.argv[1] += ".child"
    # Alone from here on but for its parent's end.
    libc.prctl(1, 9)
    if os.getppid() != parent:
        os._exit(0)

GETS = dict(pdeathsig=2, dumpable=3, keepcaps=7, timerslack=30, subreaper=37, no_new_privs=39, thp_disable=42)
for option, value in (4, 0), (36, 1), (38, 1), (41, 1):
    libc.prctl(option, value, 0, 0, 0)
libc.personality(0x0040000)
os.umask(0o31)
os.nice(3)
resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("17")


def got(option):
    value = ctypes.c_int()
    result = libc.prctl(option, ctypes.byref(value) if option in (2, 37) else 0, 0, 0, 0)
    return value.value if option in (2, 37) else result


def smaps():
    now, states = None, {}
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            names = [name for name, at in areas.items() if start <= at < end]
            now = [words[1], words[2], end - start]
            states.update((name, now) for name in names)
        elif words[0] in ("Locked:", "Anonymous:", "AnonHugePages:"):
            now.append(words[1])
        elif words[0] == "VmFlags:":
            now.append(set(words[1:]) - {"sd"})
    return states


def guarded_pages():
    mem, found = os.open("/proc/self/mem", os.O_RDONLY), []
    for name in "guarded", "guarded and locked", "guarded file":
        for page in range(PAGES):
            try:
                os.pread(mem, 1, areas[name] + page * PAGE)
            except OSError:
                found.append(areas[name] + page * PAGE)
    os.close(mem)
    return sorted(found)


def state():
    status = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status"))
    fields = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
    heap = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.endswith("[heap]\n")]
    return {
        "areas": smaps(),
        "guards": guarded_pages(),
        "status": {key: status.get(key) for key in ("Name", "Umask", "CapEff", "NoNewPrivs", "THP_enabled", "VmLck")},
        "places": [fields[n - 3] for n in (26, 27, 28, 45, 46, 47, 48, 49, 50, 51)],
        "auxv": open("/proc/self/auxv", "rb").read(),
        "exe": os.readlink("/proc/self/exe"),
        "prctl": {name: got(option) for name, option in GETS.items()},
        "personality": libc.personality(0xFFFFFFFF),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "oom": open("/proc/self/oom_score_adj").read(),
        "break": not heap or libc.sbrk(0) == int(heap[0][1], 16),
    }


def settled():
    """The state, twice the same. What /proc says of areas takes many reads, and each goes on at a byte of the text: if a restore comes between
    two of them, numbers of inodes and flags before that byte may be longer or shorter than they were, and lines are torn."""
    before = None
    while True:
        try:
            now = state()
        except (ValueError, IndexError):  # a torn line
            continue
        if now == before:
            return now
        before = now


first = settled()


def wrong():
    now = settled()
    if now["guards"] != sorted(guards):
        return "guards %s, not %s" % (list(map(hex, now["guards"])), list(map(hex, sorted(guards))))
    different = {key: (now[key], value) for key, value in first.items() if now[key] != value}
    if "areas" in different:
        different["areas"] = {k: (now["areas"].get(k), v) for k, v in first["areas"].items() if now["areas"].get(k) != v}
    return "%s" % different if different else None


rounds(sys.argv[1], wrong)
