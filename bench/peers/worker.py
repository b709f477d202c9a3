"""What the peers in Python share: see worker.lua."""

import sys
import time


def not_installed(name):
    print(f"{name} is not installed", file=sys.stderr)
    sys.exit(3)


def run(pair, milliseconds):
    finish, count = time.monotonic() + milliseconds / 1000, 0
    while True:
        for _ in range(10):
            pair()
        count += 10
        if time.monotonic() >= finish:
            return count


def count(pair, number):
    for _ in range(number):
        pair()
    return number


def serve(server_pid, pair):
    print(f"ready {server_pid}", flush=True)
    for line in sys.stdin:
        command, argument = line.split()
        began, cpu = time.monotonic(), time.process_time()
        done = {"run": run, "count": count}[command](pair, int(argument))
        elapsed, used = time.monotonic() - began, time.process_time() - cpu
        print(f"{done} {elapsed:.6f} {used:.6f}", flush=True)
