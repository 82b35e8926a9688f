# What victims share that look, again and again, whether all is right.
import itertools, os, sys, time


def rounds(output, wrong):
    """Each round writes `N ok` to `output`, or what `wrong` says, and then ends."""
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in itertools.count(1):
        problem = wrong()
        os.write(out, ("%d %s\n" % (number, problem or "ok")).encode())
        if problem:
            sys.exit(1)
        time.sleep(0.02)
