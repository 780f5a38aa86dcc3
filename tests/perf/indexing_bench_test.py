#!/usr/bin/python3
"""indexing_bench at small sizes: its phases were really there, and its lines say so."""
import argparse
import json
import subprocess
import sys
import unittest

BENCH = None
RUNS, LAYERS, KV_HEADS, STEPS = 3, 2, 1, 32  # of --quick
HEADS = RUNS * LAYERS * KV_HEADS


def bench(*arguments):
    return subprocess.run([BENCH, "--quick", *arguments], capture_output=True, text=True,
                          timeout=200, check=False)


class IndexingBenchTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        result = bench("--json")
        assert result.returncode == 0, result.stderr
        cls.lines = [json.loads(line) for line in result.stdout.splitlines()]

    def of(self, line):
        return [each for each in self.lines if each["line"] == line]

    def test_lines_say_what_was_measured(self):
        for line in self.lines:
            self.assertEqual(line["bench"], "indexing")
            self.assertEqual((line["layers"], line["kv_heads"], line["index_threads"], line["seed"]),
                             (LAYERS, KV_HEADS, 1, 1))
            self.assertEqual(line["tokens"], 128 + RUNS * 2048 + 512)

    def test_phases_come_in_their_order(self):
        phases = self.of("phase")
        self.assertEqual([phase["name"] for phase in phases],
                         ["scanned", "own first", "own again", "indexed", "other first",
                          "indexed"])
        indexed = [(phase["indexed_runs_begin"], phase["indexed_runs_end"]) for phase in phases]
        self.assertEqual(indexed, [(0, 0), (0, RUNS), (RUNS, RUNS), (RUNS, RUNS),
                                   (RUNS, 2 * RUNS), (2 * RUNS, 2 * RUNS)])
        for phase in phases:
            self.assertTrue(phase["complete"], phase)
            quiet = phase["name"] in ("scanned", "indexed")
            if quiet:
                self.assertEqual(phase["steps"], STEPS)
                self.assertEqual(phase["built"], 0)
                self.assertEqual(phase["relearned_runs"], 0)
            if phase["steps"] > 0:
                self.assertLess(0, phase["us_p50"])
                self.assertLessEqual(phase["us_p50"], phase["us_p99"])
                self.assertLessEqual(phase["us_p99"], phase["us_max"])
        # Between two looks the second building of the own runs may have begun.
        own, other = phases[1:3], phases[4]
        self.assertGreaterEqual(own[0]["built"], HEADS)
        self.assertGreater(own[1]["built"], 0)
        for key, expected in (("built", 2 * HEADS), ("relearned_runs", RUNS)):
            self.assertEqual(sum(phase[key] for phase in own), expected)
        self.assertGreaterEqual(other["built"], HEADS)
        self.assertGreater(sum(phase["steps"] for phase in phases if phase["built"] > 0), 0)

    def test_builds_are_of_all_heads_and_took_time(self):
        builds = self.of("build")
        self.assertEqual([build["name"] for build in builds],
                         ["own, decoding", "another, decoding", "nobody decoding",
                          "behind its prefill"])
        for build in builds:
            self.assertEqual(build["heads"], HEADS)
            self.assertGreaterEqual(build["built"], HEADS)
            self.assertEqual(build["failed"], 0)
            self.assertGreater(build["core_s"], 0)
            self.assertAlmostEqual(build["core_s_per_gib"], build["core_s"] / build["gib"], 6)

    def test_disturbed_steps_are_compared_with_quiet_ones(self):
        disturbed = self.of("disturbed")
        self.assertEqual([(each["name"], each["by"], each["quiet_steps"]) for each in disturbed],
                         [("own first", "scanned", STEPS), ("own again", "indexed", 2 * STEPS),
                          ("other first", "indexed", 2 * STEPS)])

    def test_says_what_is_wrong(self):
        for arguments, words in ((("--kv-heads", "3"), ("--heads", "16", "3")),
                                 (("--samples", "48"), ("--samples", "48")),
                                 (("--steps", "4096"), ("--steps", "4096")),
                                 (("--families", "none,rope"), ("none", "mean-key")),
                                 (("--run-tokens", "2050"), ("--run-tokens", "2050"))):
            result = subprocess.run([BENCH, *arguments], capture_output=True, text=True, timeout=100,
                                    check=False)
            self.assertEqual(result.returncode, 1, arguments)
            for word in words:
                self.assertIn(word, result.stderr)
        for dim in ("72", "576", "8"):
            result = subprocess.run([BENCH, "--head-dim", dim], capture_output=True, text=True,
                                    timeout=100, check=False)
            self.assertNotEqual(result.returncode, 0)
            for word in ("--head-dim", dim, "multiple of 16 up to 512"):
                self.assertIn(word, result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", required=True, help="the program")
    known, rest = parser.parse_known_args()
    BENCH = known.bench
    unittest.main(argv=[sys.argv[0], *rest])
