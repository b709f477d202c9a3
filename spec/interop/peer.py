"""A Python program that locks with django-pglocks: reads commands from stdin, a line each, and
answers each with a line. "take KEY [shared] [try]", KEY in JSON, holds the lock until "release"."""

import json
import os
import sys

import django
from django.conf import settings

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": os.environ["PGHOST"],
            "PORT": os.environ["PGPORT"],
            "USER": os.environ["PGUSER"],
            "NAME": os.environ["PGDATABASE"],
        }
    }
)
django.setup()

from django.db import connection  # noqa: E402
from django_pglocks import advisory_lock  # noqa: E402

held = None
for line in sys.stdin:
    words = line.rstrip("\n").split("\t")
    if words[0] == "pid":
        connection.ensure_connection()
        print(connection.connection.get_backend_pid(), flush=True)
    elif words[0] == "take":
        key = json.loads(words[1])
        held = advisory_lock(key, shared="shared" in words, wait="try" not in words)
        print(held.__enter__(), flush=True)
    elif words[0] == "release":
        held.__exit__(None, None, None)
        print("released", flush=True)
