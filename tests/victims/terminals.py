# A tree with pseudoterminals of its own: `terminals.py OUTPUT DIRECTORY`. Its session is controlled by a pair of which both ends are
# here. Each time a line has gone through it and all settings are as they were made, it writes `N ok` to OUTPUT, or what is wrong. While
# there is a file `hold` in DIRECTORY, it does nothing and has put a file `resting` there.
import ctypes, fcntl, os, signal, struct, sys, termios, time

TIOCGSID = 0x5429
output, directory = sys.argv[1:]
hold, resting = (os.path.join(directory, name) for name in ("hold", "resting"))
out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
master, slave = os.openpty()
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
controlling = os.open("/dev/tty", os.O_RDWR)
lonely, gone = os.openpty()
os.close(gone)

settings = termios.tcgetattr(slave)
settings[3] &= ~termios.ECHO
settings[6][termios.VINTR] = b"\x02"
termios.tcsetattr(slave, termios.TCSANOW, settings)
window = struct.pack("HHHH", 33, 99, 5, 6)
fcntl.ioctl(slave, termios.TIOCSWINSZ, window)
fcntl.ioctl(lonely, termios.TIOCSWINSZ, struct.pack("HHHH", 1, 2, 3, 4))

child = os.fork()
if child == 0:
    # In the background, with the terminal open. PR_SET_PDEATHSIG: it ends with its parent.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)
    while True:
        time.sleep(100)
os.setpgid(child, child) if os.getpgid(child) != child else None


def wrong():
    os.write(master, b"line %d\n" % number)
    if os.read(slave, 100) != b"line %d\n" % number:
        return "the line"
    os.write(controlling, b"back %d\n" % number)
    # The master's side knows no lines: they come in pieces.
    back = b""
    while not back.endswith(b"\n"):
        back += os.read(master, 100)
    if back != b"back %d\r\n" % number:
        return "the way back: %r" % back
    if termios.tcgetattr(slave) != settings:
        return "settings %r, were %r" % (termios.tcgetattr(slave), settings)
    if fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)) != window:
        return "the window"
    session = struct.unpack("i", fcntl.ioctl(controlling, TIOCGSID, bytes(4)))[0]
    if session != os.getsid(0) or os.tcgetpgrp(slave) != os.getpgrp():
        return "session %d, group %d" % (session, os.tcgetpgrp(slave))
    if os.getpgid(child) != child or os.getsid(child) != os.getsid(0):
        return "the child"
    if fcntl.ioctl(lonely, termios.TIOCGWINSZ, bytes(8)) != struct.pack("HHHH", 1, 2, 3, 4):
        return "the other window"


number = 0
while True:
    number += 1
    problem = wrong()
    os.write(out, ("%d %s\n" % (number, problem or "ok")).encode())
    if problem:
        sys.exit(1)
    time.sleep(0.02)
    if os.path.exists(hold):
        open(resting, "w").close()
        while os.path.exists(hold):
            time.sleep(0.01)
        os.unlink(resting)
