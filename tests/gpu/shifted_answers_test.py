#!/usr/bin/python3
"""Answers of the trained models over a document that is reused at another position.

A document of records (deploy/demo_text.py) is cached behind one text. Behind two others, shorter and
longer, it is asked about twice: reused where it is cached, and computed. Prints for each how many of
32 answers are right and the time to the first token.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "deploy"))
from demo_text import KeyValueText, Vocabulary  # noqa: E402

DOCUMENT, RECORDS, QUESTIONS = 2048, 48, 32
ARGUMENTS = None


class Worker:
    def __init__(self, model, socket, *options):
        self.process = subprocess.Popen(
            [ARGUMENTS.worker, "--model", model, "--socket", socket, "--serve", *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()

    def request(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["status"] == "OK", answer
        return answer

    def open(self, tokens):
        return self.request(op="open", tokens=tokens, max_tokens=4000)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class ShiftedAnswersTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(prefix="quarry-shifted-")
        self.socket = os.path.join(self.directory.name, "q.sock")
        self.daemon = subprocess.Popen(
            [ARGUMENTS.daemon, "--socket", self.socket, "--grpc-socket",
             os.path.join(self.directory.name, "g.sock"), "--metrics", "off", "--arena-bytes",
             "512MiB"], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while not os.path.exists(self.socket):
            self.assertIsNone(self.daemon.poll())
            self.assertLess(time.monotonic(), end, "quarryd does not start")
            time.sleep(0.02)

    def tearDown(self):
        self.daemon.terminate()
        self.daemon.wait()
        self.directory.cleanup()

    def right(self, worker, sequence, document, questions):
        count = 0
        for record in questions:
            answer = worker.request(op="ask", sequence=sequence, tokens=document.question(record),
                                    new=2, fork=True)
            count += answer["predicted"] == list(record.answer)
        return count

    def cache(self, worker, tokens):
        """Publishing runs in the background: until all whole blocks are found."""
        whole = (len(tokens) - 1) // 256 * 256
        end = time.monotonic() + 60
        while True:
            opened = worker.open(tokens)
            worker.request(op="close", sequence=opened["sequence"])
            if opened["reused_tokens"] == whole:
                return
            self.assertLess(time.monotonic(), end, "the document is not published")

    def check(self, name):
        model = os.path.join(ROOT, "tests/models", name)
        vocabulary = Vocabulary(model)
        document = KeyValueText(vocabulary, DOCUMENT + 1, RECORDS, ARGUMENTS.seed)
        body = document.tokens[1:]
        questions = document.questions(QUESTIONS, 0, 0)

        def text(tokens):
            return KeyValueText(vocabulary, tokens, 2, ARGUMENTS.seed + tokens).tokens

        plain, reusing = Worker(model, self.socket), Worker(model, self.socket, "--reuse-shifted")
        self.cache(plain, text(512) + body + text(64)[1:])
        for before in (256, 1024):
            prompt = text(before) + body + text(65)[1:]
            rows = {}
            for how, worker in (("reused", reusing), ("computed", plain)):
                opened = worker.open(prompt)
                count = self.right(worker, opened["sequence"], document, questions)
                rows[how] = count
                print(f"{name}: {DOCUMENT} tokens moved by {before - 512}, {how}: {count} of "
                      f"{QUESTIONS} right, first token after {opened['ttft_ms']:.0f} ms")
                self.assertEqual(opened["shifted_tokens"], DOCUMENT if how == "reused" else 0)
            self.assertGreaterEqual(rows["reused"], rows["computed"] - 4)
            self.assertGreaterEqual(rows["computed"], QUESTIONS - 4)
        for worker in (plain, reusing):
            worker.close()

    def test_default_rope(self):
        self.check("llama-a")

    def test_longrope(self):
        self.check("phi3-b")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--seed", type=int, default=1)
    ARGUMENTS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0]] + rest)
