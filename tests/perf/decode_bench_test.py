#!/usr/bin/python3
"""decode_bench.py: a line for the prompt and for every method, with the figures that were measured."""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "perf"))
import decode_bench

BUILD = None


class DecodeBenchTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.models = directory.name

    def run_bench(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = decode_bench.main(["--build", BUILD, "--models", self.models, "--shape", "tiny",
                                        "--device", "host", "--full-bytes", str(1 << 30), *arguments])
        return status, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()

    def test_every_method_decodes_behind_the_same_context(self):
        status, rows, err = self.run_bench("--tokens", "9000", "--new-tokens", "3",
                                           "--budget", "budget-error=0.05", "--engine", "task_tokens = 1024")
        self.assertEqual(status, 0, err)
        self.assertEqual([row["method"] for row in rows], ["prefill", "full", "alone", "paged", "device", "host"])
        self.assertGreater(rows[0]["s"], 0)
        for row in rows[1:]:
            self.assertEqual((row["tokens"], row["layers"], row["new_tokens"]), (9000, 2, 3))
            self.assertLessEqual(row["ms_p50"], row["ms_p99"])
            self.assertGreater(row["ms_p50"], 0)
            self.assertGreater(row["device_peak_bytes"], 0)
        full, alone, paged, device, host = rows[1:]
        for here in (full, alone, paged):
            self.assertEqual(here["daemon_bytes_read"], 0)
        self.assertGreaterEqual(paged["kv_bytes"], full["kv_bytes"] * 0.8)
        self.assertEqual(alone["daemon_us_mean"], 0)  # it knows no daemon
        for beside in (device, host):
            self.assertGreater(beside["daemon_bytes_read"], 0)
            self.assertGreater(beside["daemon_us_mean"], 0)
            self.assertLess(beside["daemon_us_mean"], 1e3 * beside["ms_p99"])
        # The window alone is here, in place of everything.
        self.assertLess(device["kv_bytes"], full["kv_bytes"] / 5)
        self.assertEqual(device["kv_bytes"], host["kv_bytes"])

    def test_contexts_decode_together(self):
        for distinct in ([], ["--distinct"]):
            status, rows, err = self.run_bench("--tokens", "700", "--new-tokens", "3", "--batch", "1", "3",
                                               "--methods", "alone", "host", *distinct)
            self.assertEqual(status, 0, err)
            self.assertEqual([(row["method"], row["batch"]) for row in rows[1:]],
                             [("alone", 1), ("alone", 3), ("host", 1), ("host", 3)])
            self.assertEqual(rows[0]["prompts"], 3 if distinct else 1)
            for one, three in (rows[1:3], rows[3:5]):
                self.assertEqual(three["kv_bytes"], 3 * one["kv_bytes"])
                self.assertEqual(three["daemon_bytes_read"] > 0, three["method"] == "host")
                self.assertEqual(three["distinct"], bool(distinct))
                self.assertGreater(three["tokens_per_s"], 0)

    def test_what_a_worker_refuses_is_the_error(self):
        status, rows, err = self.run_bench("--tokens", "300", "--device-bytes", "1000")
        self.assertEqual((status, rows), (1, []))
        self.assertIn("decode_bench: ", err)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    settings, rest = parser.parse_known_args()
    BUILD = settings.build
    unittest.main(argv=[sys.argv[0], *rest])
