#!/usr/bin/python3
"""A daemon that is killed or stops in the middle of a token: the worker says so in time and goes on to live, whoever
sends the rows and waits for the answers. With --device cuda the card does both."""
import argparse
import os
import signal
import sys
import tempfile
import threading
import time
import unittest

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path += [os.path.join(ROOT, "deploy"), os.path.join(ROOT, "perf")]
from decode.random_model import write_model
from processes import Daemon, Worker

SETTINGS = None
DEADLINE_S = 2
LATE_S = 5  # beyond the deadline, on busy machines
PROMPT = [3 + i * 7 % 500 for i in range(1500)]


class LostDaemonTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.model = os.path.join(directory.name, "model")
        write_model(self.model, "tiny", 0, 1 << 17, 1)

    def lose(self, rings, lost_by, contexts):
        """Statuses of asks under which the daemon goes, and how long they took behind that."""
        with Daemon(SETTINGS.build) as daemon, Worker(
                SETTINGS.build, self.model, "--socket", daemon.socket, "--rings", rings, "--device", SETTINGS.device,
                "--device-bytes", str(4 << 30), "--deadline-ms", str(1000 * DEADLINE_S)) as worker:
            asks = [{"sequence": worker.call("open", tokens=PROMPT, max_tokens=120000)["sequence"], "tokens": [5 + i],
                     "new": 100000} for i in range(contexts)]
            gone = []

            def lose_it():
                daemon.process.send_signal(lost_by)
                gone.append(time.monotonic())

            timer = threading.Timer(1, lose_it)
            timer.start()
            try:
                answers = worker.call("batch", asks=asks)["answers"]
                answered = time.monotonic()
                timer.join()
                took = answered - gone[0]
                self.assertGreater(took, 0, answers)
                again = worker.try_call("ask", sequence=1, tokens=[5])
                self.assertEqual(again["status"], "FAILED_PRECONDITION", again)
            finally:
                if lost_by == signal.SIGSTOP:
                    daemon.process.send_signal(signal.SIGCONT)
            opened = worker.try_call("open", tokens=PROMPT, max_tokens=2000)
            self.assertEqual(opened["status"], "UNAVAILABLE", opened)  # the session is over
            return answers, took

    def expect_unavailable(self, lost_by, least_s, most_s):
        for rings in SETTINGS.rings:
            for contexts in (1, 3):
                with self.subTest(rings=rings, contexts=contexts):
                    answers, took = self.lose(rings, lost_by, contexts)
                    self.assertEqual([answer["status"] for answer in answers], contexts * ["UNAVAILABLE"], answers)
                    self.assertGreater(took, least_s)
                    self.assertLess(took, most_s)

    def test_a_killed_daemon_is_noticed_at_once(self):
        self.expect_unavailable(signal.SIGKILL, 0, LATE_S)

    def test_a_stopped_daemon_is_given_up_at_the_deadline(self):
        self.expect_unavailable(signal.SIGSTOP, DEADLINE_S / 2, DEADLINE_S + LATE_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    parser.add_argument("--device", default="host")
    parser.add_argument("--rings", nargs="+", default=["device", "host"])
    SETTINGS, rest = parser.parse_known_args()
    unittest.main(argv=sys.argv[:1] + rest)
