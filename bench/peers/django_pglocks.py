"""django-pglocks, which makes a cursor for each lock and puts the key into the statement."""

import sys

sys.dont_write_bytecode = True  # of worker.py, beside it
import worker  # noqa: E402

sys.path.pop(0)  # the folder of this file, which has the library's name
try:
    import django
    import django_pglocks
    from django.conf import settings
    from psycopg2.extensions import parse_dsn
except ModuleNotFoundError:
    worker.not_installed("django-pglocks")

options = parse_dsn(sys.argv[1])
name = options.pop("dbname")
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": name,
            "OPTIONS": options,
        }
    }
)
django.setup()

from django.db import connection  # noqa: E402


def pair():
    with django_pglocks.advisory_lock(4242):
        pass


connection.ensure_connection()
worker.serve(connection.connection.info.backend_pid, pair)
