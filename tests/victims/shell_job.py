# A shell and its job: `shell_job.py IMAGES DUMP... -- RESTORE...`. The job answers what is typed on its terminal. It is dumped by DUMP,
# its PID put in the place of @, and restored by RESTORE on another terminal; there it must go on. Prints `ok`.
import os, pty, select, signal, subprocess, sys, termios, time

JOB = """
import sys
for number, line in enumerate(iter(sys.stdin.readline, ''), 1):
    print('said', number, line.strip(), flush=True)
"""


def shell(files):
    """A session leader whose job is in the foreground of its terminal."""
    job = subprocess.Popen([sys.executable, "-u", "-c", JOB], preexec_fn=lambda: os.setpgid(0, 0))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, job.pid)
    with open(files + ".new", "w") as file:
        file.write(str(job.pid))
    os.rename(files + ".new", files)
    job.wait()
    time.sleep(1000)


def expect(terminal, words):
    seen, end = b"", time.time() + 60
    while words.encode() not in seen:
        if not select.select([terminal], [], [], max(0, end - time.time()))[0]:
            sys.exit("no %r but %r" % (words, seen))
        try:
            seen += os.read(terminal, 1000)
        except OSError as error:
            sys.exit("no %r but %r and %s" % (words, seen, error))


images, commands = sys.argv[1], sys.argv[2:]
dump, restore = commands[: commands.index("--")], commands[commands.index("--") + 1 :]
file = os.path.join(images, "job")
leader, terminal = pty.fork()
if leader == 0:
    shell(file)
while not os.path.exists(file):
    time.sleep(0.01)
job = open(file).read()
try:
    os.write(terminal, b"one\n")
    expect(terminal, "said 1 one")
    subprocess.run([job if word == "@" else word for word in dump], check=True, stdin=subprocess.DEVNULL)
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    restorer, terminal = pty.fork()
    if restorer == 0:
        os.execvp(restore[0], restore)
    # Until the job is there, what is typed waits.
    os.write(terminal, b"two\n")
    expect(terminal, "said 2 two")
    os.write(terminal, b"three\n")
    expect(terminal, "said 3 three")
    print("ok")
finally:
    subprocess.run(["kill", "-9", job], stderr=subprocess.DEVNULL)
