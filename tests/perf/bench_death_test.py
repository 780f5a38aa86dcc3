#!/usr/bin/python3
"""A benchmark that is ended by a signal, and so cleans nothing up, leaves no daemon behind."""
import argparse
import os
import signal
import subprocess
import sys
import time
import unittest

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
BUILD = None
# As lifecycle_bench.py and the demo start theirs.
PYTHON_DRIVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from processes import Daemon
daemon = Daemon(sys.argv[2])
time.sleep(600)
"""


def stat(pid):
    """State and parent of a process; none if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return state, int(parent)


def ended(pid):
    return (stat(pid) or "Z")[0] == "Z"  # nobody may ask an orphan how it ended


def daemons(parent):
    """Its children that run quarryd, rather than still being copies of it."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if (stat(name) or ("", 0))[1] != parent:
            continue
        try:
            if os.path.basename(os.readlink(f"/proc/{name}/exe")) == "quarryd":
                found.append(int(name))
        except OSError:
            pass
    return found


def wait_for(condition):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    return None


class BenchDeathTest(unittest.TestCase):
    def ends_with_its_daemon(self, command, number):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as bench:
            try:
                started = wait_for(lambda: daemons(bench.pid) or bench.poll() is not None)
                self.assertIsInstance(started, list, "no daemon was started")
                bench.send_signal(number)
                self.assertEqual(bench.wait(60), -number)
            finally:
                bench.kill()
        for pid in started:
            self.assertTrue(wait_for(lambda pid=pid: ended(pid)), f"quarryd {pid} lives on")

    def test_of_the_benchmarks_in_cpp(self):
        bench = os.path.join(BUILD, "perf", "indexing_bench")
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.ends_with_its_daemon([bench, "--quick", "--rounds", "100"], number)

    def test_of_the_drivers_in_python(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.ends_with_its_daemon(
                [sys.executable, "-c", PYTHON_DRIVER, os.path.join(ROOT, "deploy"), BUILD], number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", required=True, help="where the programs are")
    known, rest = parser.parse_known_args()
    BUILD = known.build
    unittest.main(argv=[sys.argv[0], *rest])
