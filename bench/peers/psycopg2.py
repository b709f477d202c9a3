"""psycopg2, which puts the parameters into the statement itself and sends that as text."""

import sys

sys.dont_write_bytecode = True  # of worker.py, beside it
import worker  # noqa: E402

sys.path.pop(0)  # the folder of this file, which has the library's name
try:
    import psycopg2
except ModuleNotFoundError:
    worker.not_installed("psycopg2")

KEY = 4242

connection = psycopg2.connect(sys.argv[1])
connection.autocommit = True
cursor = connection.cursor()


def pair():
    cursor.execute("SELECT pg_advisory_lock(%s)", (KEY,))
    cursor.execute("SELECT pg_advisory_unlock(%s)", (KEY,))


worker.serve(connection.info.backend_pid, pair)
