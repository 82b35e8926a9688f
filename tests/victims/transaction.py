# Is in the middle of a transaction of SQLite most of the time: `transaction.py OUTPUT DATABASE`. After each it checks the database, and writes
# `N ok` to OUTPUT, or what is wrong.
import itertools, os, sqlite3, sys, time

ROWS = 50
database = sqlite3.connect(sys.argv[2], isolation_level=None)
database.execute("create table rows (number integer primary key, text)")
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in itertools.count(1):
    database.execute("begin immediate")
    for row in range(ROWS):
        database.execute("insert into rows (text) values (?)", ("%d of round %d" % (row, number),))
        time.sleep(0.001)
    database.execute("commit")
    count = database.execute("select count(*) from rows").fetchone()[0]
    integrity = database.execute("pragma integrity_check").fetchone()[0]
    right = count == number * ROWS and integrity == "ok"
    os.write(out, b"%d %s\n" % (number, b"ok" if right else b"error: %d rows, %s" % (count, integrity.encode())))
