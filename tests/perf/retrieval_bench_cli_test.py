#!/usr/bin/python3
"""retrieval_bench as its user meets it: traces that another program wrote, rows, errors."""
import argparse
import array
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest

BENCH = None
TOKENS, KV_HEADS, HEADS, HEAD_DIM = 2000, 2, 4, 16


def safetensors(tensors, metadata):
    """A file of the format, written from its specification: {name: (dtype, shape, bytes)}."""
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def bf16(numbers):
    """The upper halves of the floats."""
    words = array.array("H", array.array("f", numbers).tobytes())
    return words[1::2].tobytes()


def trace(seed, layer, metadata=None):
    """Normal keys, and queries that each look for one of them."""
    rng = random.Random(seed)
    keys = [[rng.gauss(0, 1) for _ in range(HEAD_DIM)] for _ in range(TOKENS * KV_HEADS)]
    values = [rng.gauss(0, 1) for _ in range(TOKENS * KV_HEADS * HEAD_DIM)]

    def queries(count):
        out = []
        for _ in range(count * HEADS):
            sought = keys[rng.randrange(len(keys))]
            out += [3 * x + rng.gauss(0, 0.3) for x in sought]
        return array.array("f", out).tobytes()

    def positions(low, count):
        return array.array("i", range(low, low + count)).tobytes()

    shape = [TOKENS, KV_HEADS, HEAD_DIM]
    return safetensors(
        {"k": ("BF16", shape, bf16([x for key in keys for x in key])),
         "v": ("BF16", shape, bf16(values)),
         "q_train": ("F32", [8, HEADS, HEAD_DIM], queries(8)),
         "q_train_pos": ("I32", [8], positions(TOKENS - 20, 8)),
         "q": ("F32", [4, HEADS, HEAD_DIM], queries(4)),
         "q_pos": ("I32", [4], positions(TOKENS - 4, 4))},
        metadata or {"scale": "0.25", "model": "by hand", "layer": str(layer)})


class RetrievalBenchTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)

    def write(self, name, data):
        with open(os.path.join(self.directory.name, name), "wb") as file:
            file.write(data)

    def bench(self, *arguments):
        return subprocess.run([BENCH, "--samples", "0", "--threads", "1", *arguments],
                              capture_output=True, text=True, timeout=200, check=False)

    def rows(self, *arguments):
        result = self.bench(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return [json.loads(line) for line in result.stdout.splitlines()]

    def test_every_file_of_a_directory_is_measured_under_its_name(self):
        self.write("b-late.safetensors", trace(1, 7))
        self.write("a-early.safetensors", trace(2, 3))
        self.write("notes.txt", b"no trace")
        rows = self.rows("--traces", self.directory.name, "--indexes", "exact")
        names = list(dict.fromkeys((row["trace"], row["layer"]) for row in rows))
        self.assertEqual(names, [("a-early", 3), ("b-late", 7)])
        self.assertEqual({row["head"] for row in rows}, {0, 1})
        self.assertEqual({row["n"] for row in rows}, {TOKENS})
        exact = [row for row in rows if row["index"] == "exact" and row["budget"] == "all"]
        self.assertEqual(len(exact), 4)
        for row in exact:
            self.assertLess(row["rel_l2"], 1e-5)
            self.assertAlmostEqual(row["mass"], 1, 4)
        # Others than the whole have an error, so that the trace is what is measured.
        self.assertTrue(any(row["rel_l2"] > 1e-3 for row in rows if row["index"] == "exact"))

    def test_families_of_hard_heads_are_measured(self):
        rows = self.rows("--synthetic", "rope,mass-300", "--tokens", "4096", "--seed", "5",
                         "--kv-heads", "1", "--indexes", "exact")
        self.assertEqual(list(dict.fromkeys(row["trace"] for row in rows)),
                         ["rope-4096-5", "mass-300-4096-5"])
        result = self.bench("--synthetic", "mass-31", "--tokens", "4096")
        self.assertEqual(result.returncode, 1)
        self.assertIn("mass-31", result.stderr)
        self.assertIn("mean-key", result.stderr)

    def test_measures_the_default_set_where_no_trace_is_named(self):
        with subprocess.Popen([BENCH, "--indexes", "exact", "--queries", "1", "--samples", "0",
                               "--train-queries", "8"],
                              stdout=subprocess.PIPE, text=True) as bench:
            row = json.loads(bench.stdout.readline())
            bench.kill()
        self.assertEqual((row["trace"], row["n"]), ("needles-32768-1", 32768))
        helped = self.bench("--help")
        self.assertIn("32768 tokens under every index", " ".join(helped.stdout.split()))
        result = self.bench("--tokens", "4096")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("--synthetic", result.stderr)

    def test_refuses_names_that_choose_nothing(self):
        for option, known in (("--indexes", "clusters"), ("--budgets", "mass-0.9")):
            result = self.bench("--random", "2000", option, known, "nosuch")
            self.assertEqual(result.returncode, 1, result)
            self.assertIn(f"{option}: no name begins with nosuch; there are ", result.stderr)
            self.assertIn(known, result.stderr)
            self.assertEqual(result.stdout, "")
        result = self.bench("--random", "2000", "--indexes", "hnsw", "--budgets", "error-")
        self.assertEqual(result.returncode, 1, result)
        self.assertIn("none of --indexes hnsw is measured under --budgets error-", result.stderr)

    def test_says_which_file_is_wrong(self):
        self.write("good.safetensors", trace(1, 0))
        self.write("wrong.safetensors", trace(1, 0, {"scale": "0.25", "model": "m"}))
        result = self.bench("--traces", self.directory.name, "--indexes", "exact")
        self.assertEqual(result.returncode, 1)
        self.assertIn("wrong.safetensors", result.stderr)
        self.assertIn("layer", result.stderr)
        self.assertIn('"good"', result.stdout)
        for directory in ("/nonexistent", tempfile.mkdtemp(dir=self.directory.name)):
            result = self.bench("--traces", directory)
            self.assertEqual(result.returncode, 1)
            self.assertIn(directory, result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", required=True, help="the program")
    known, rest = parser.parse_known_args()
    BENCH = known.bench
    unittest.main(argv=[sys.argv[0], *rest])
