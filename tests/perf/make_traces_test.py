#!/usr/bin/python3
"""make_traces.py: names, what is there already, and that a trace holds the run it is named for."""
import argparse
import contextlib
import io
import json
import os
import random
import struct
import sys
import tempfile
import unittest
import unittest.mock

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "perf"))
import make_traces

BUILD = None


def header(path):
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


class MakeTracesTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.drawn = []

    def sequence(self, task, tokens, decoded, seed):
        self.drawn.append((task, tokens, decoded, seed))
        rng = random.Random(seed)
        return [rng.randrange(32, 2048) for _ in range(tokens)]

    def make(self, model, *arguments):
        settings = make_traces.parse([self.directory.name, "--build", BUILD, "--decoded", "8",
                                      "--queries", "20", *arguments])
        return make_traces.make(settings, model, "hop", 300, self.sequence)

    def test_a_run_becomes_a_trace_for_each_layer(self):
        self.assertEqual(self.make("llama-a", "--layers", "0", "4", "--seed", "7"), 2)
        self.assertEqual(self.drawn, [("hop", 300, 8, 7)])
        self.assertEqual(sorted(os.listdir(self.directory.name)),
                         ["llama-a-hop-300-layer-00.safetensors",
                          "llama-a-hop-300-layer-04.safetensors"])
        trace = header(os.path.join(self.directory.name, "llama-a-hop-300-layer-04.safetensors"))
        self.assertEqual(trace["__metadata__"]["layer"], "4")
        self.assertEqual(trace["__metadata__"]["model"], "llama-a")
        self.assertEqual(trace["k"]["shape"], [300, 2, 128])
        # The prompt's last token is decoded, too.
        self.assertEqual(trace["q"]["shape"], [9, 6, 128])
        self.assertEqual(trace["q_train"]["shape"], [84, 6, 128])

    def test_what_is_there_is_left_alone(self):
        self.assertEqual(self.make("phi3-b"), 6)
        kept = os.path.join(self.directory.name, "phi3-b-hop-300-layer-02.safetensors")
        lost = os.path.join(self.directory.name, "phi3-b-hop-300-layer-03.safetensors")
        before = os.stat(kept).st_mtime_ns
        self.assertEqual(self.make("phi3-b"), 0)
        self.assertEqual(len(self.drawn), 1)
        os.remove(lost)
        self.assertEqual(self.make("phi3-b"), 1)
        self.assertTrue(os.path.exists(lost))
        self.assertEqual(os.stat(kept).st_mtime_ns, before)

    def refused(self, *arguments, directory=None):
        """The one line that is said."""
        log = io.StringIO()
        with contextlib.redirect_stderr(log), self.assertRaises(SystemExit) as caught:
            make_traces.main([directory or self.directory.name, "--build", BUILD, *arguments])
        self.assertEqual(caught.exception.code, 2)
        self.assertRegex(log.getvalue(), r"\Amake_traces: .*\n\Z")
        return log.getvalue()

    def test_wrong_arguments(self):
        for *arguments, word in (("--decoded", "0", "--decoded 0"), ("--decoded", "-3", "--decoded -3"),
                                 ("--tokens", "300", "--decoded", "1000", "no prompt of --tokens 300"),
                                 ("--tokens", "4096", "8", "--tokens 8"), ("--queries", "-4", "--queries -4"),
                                 ("--seed", "-1", "--seed -1"), ("--models", "gpt", "no model gpt"),
                                 ("--layers", "0", "99", "llama-a has layers 0 to 4"),
                                 ("--build", self.directory.name, "no program")):
            self.assertIn(word, self.refused(*arguments))
        self.assertEqual(os.listdir(self.directory.name), [])

    def test_without_numpy(self):
        with unittest.mock.patch("importlib.util.find_spec", return_value=None):
            self.assertIn("numpy", self.refused())

    def test_a_directory_that_cannot_be_made(self):
        path = os.path.join(self.directory.name, "file")
        with open(path, "w", encoding="utf-8"):
            pass
        with unittest.mock.patch("importlib.util.find_spec"):
            self.assertIn(path, self.refused(directory=path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", required=True, help="folder of the built programs")
    known, rest = parser.parse_known_args()
    BUILD = known.build
    unittest.main(argv=[sys.argv[0], *rest])
