#!/usr/bin/python3
"""prefill_bench as its user meets it, on the host and in small: its lines, its table, its errors."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import unittest

BENCH = None
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 3000, 8, 2, 64
SMALL = {"--shape": "small", "--tokens": TOKENS, "--repetitions": 2, "--chunk-rows": 1024,
         "--sampled-rows": 8, "--sampled-tiles": 4}
TIMES = ("plan_ms", "attend_ms", "dense_ms", "rate_share", "speedup", "speedup_with_plan")
FIDELITY = ("mass", "least_mass", "error", "last_mass", "last_least_mass", "last_error")


def bench(*arguments):
    """Small, unless the arguments say otherwise."""
    small = [str(word) for option in SMALL.items() if option[0] not in arguments
             for word in option]
    return subprocess.run([BENCH, *small, *arguments], capture_output=True, text=True, timeout=200,
                          check=False)


def lines(*arguments):
    result = bench(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


class PrefillBenchTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.lines = lines("--densities", "0.3", "0.6", "--masses", "0.95", "--mix", "--full")
        cls.rows = [line for line in cls.lines if line["line"] == "row"]

    def test_every_line_says_what_was_measured(self):
        for line in self.lines:
            self.assertEqual(
                (line["bench"], line["device"], line["shape"], line["heads"], line["kv_heads"],
                 line["head_dim"], line["dtype"], line["tokens"], line["seed"]),
                ("prefill", "host", "small", HEADS, KV_HEADS, HEAD_DIM, "bf16", TOKENS, 1))

    def test_rows_are_dense_attention_and_each_pattern_as_asked(self):
        asked = [(row["kinds"], row["pattern"], row["asked_density"], row["asked_mass"])
                 for row in self.rows]
        self.assertEqual(asked, [
            ("lines", "dense", None, None),
            ("lines", "a_shape", 0.3, None), ("lines", "a_shape", 0.6, None),
            ("lines", "vertical_slash", 0.3, None), ("lines", "vertical_slash", 0.6, None),
            ("lines", "vertical_slash_mass", 0.3, None), ("lines", "vertical_slash_mass", 0.6, None),
            ("lines", "vertical_slash_mass", None, 0.95),
            ("lines", "block_sparse", 0.3, None), ("lines", "block_sparse", 0.6, None),
            ("lines", "block_scored", 0.3, None), ("lines", "block_scored", 0.6, None),
            ("mixed", "dense", None, None), ("mixed", "by_kind", None, 0.95)])

    def test_heads_come_with_what_an_oracle_needs(self):
        heads = [line for line in self.lines if line["line"] == "head"]
        self.assertEqual([(line["kinds"], line["head"]) for line in heads],
                         [(kinds, h) for kinds in ("lines", "mixed") for h in range(HEADS)])
        self.assertEqual({line["kind"] for line in heads[:HEADS]}, {"lines"})
        self.assertEqual({line["kind"] for line in heads[HEADS:]},
                         {"lines", "local", "blocks", "diffuse"})
        for line in heads:
            self.assertLess(0, line["oracle_tiles_share"])
            self.assertLessEqual(line["oracle_tiles_share"], line["oracle_blocks_share"])
            self.assertLessEqual(line["oracle_blocks_share"], 1)
            if line["kind"] == "diffuse":
                self.assertGreater(line["oracle_blocks_share"], 0.9)

    def test_numbers_hang_together(self):
        for row in self.rows:
            for name in TIMES:
                self.assertLessEqual(row[name + "_p10"], row[name], (row["pattern"], name))
                self.assertLessEqual(row[name], row[name + "_p90"])
            self.assertLess(0, row["attend_ms"])
            self.assertLess(0, row["tflops"])
            self.assertLess(0, row["peak_bytes"])
            self.assertFalse(row["dense_scaled"])
            for name in FIDELITY:
                self.assertLessEqual(0, row[name], (row["pattern"], name))
            self.assertLessEqual(row["mass"], 1)
            self.assertLessEqual(row["least_mass"], row["mass"])
            self.assertEqual(sum(kind["heads"] for kind in row["by_kind"]), HEADS)
            self.assertEqual(row["peers"], [])
            if row["pattern"] == "dense":
                self.assertEqual((row["tiles_share"], row["speedup"], row["rate_share"]), (1, 1, 1))
                self.assertGreater(row["mass"], 0.9999)
                self.assertLess(row["error"], 1e-4)
                continue
            self.assertLessEqual(row["tiles_share"], 1)
            if row["asked_density"] is not None:
                self.assertLess(row["tiles_share"], row["asked_density"] + 1e-9)
                self.assertGreater(row["tiles_share"], row["asked_density"] * 0.7)

    def test_more_tiles_have_more_of_the_mass(self):
        by = {(row["pattern"], row["asked_density"], row["asked_mass"]): row
              for row in self.rows if row["kinds"] == "lines"}
        for pattern in ("a_shape", "block_sparse", "block_scored"):
            self.assertLess(by[pattern, 0.3, None]["mass"], by[pattern, 0.6, None]["mass"])
        # Lines are chosen for the last queries alone.
        for pattern in ("vertical_slash", "vertical_slash_mass"):
            self.assertLess(by[pattern, 0.3, None]["last_mass"], by[pattern, 0.6, None]["last_mass"])
        # What is planned by mass has it where it was planned.
        self.assertGreaterEqual(by["vertical_slash_mass", None, 0.95]["last_mass"], 0.949)
        # These heads are made of lines.
        self.assertGreater(by["vertical_slash", 0.3, None]["mass"], by["a_shape", 0.3, None]["mass"])

    def test_each_kind_of_head_stands_beside_the_layer(self):
        row = self.rows[-1]
        kinds = {kind["kind"]: kind for kind in row["by_kind"]}
        self.assertEqual({name: kind["heads"] for name, kind in kinds.items()},
                         {"lines": 5, "local": 1, "blocks": 1, "diffuse": 1})
        self.assertEqual(kinds["diffuse"]["tiles_share"], 1)
        self.assertGreater(kinds["diffuse"]["mass"], 0.9999)
        self.assertLess(kinds["lines"]["tiles_share"], 1)

    def test_dense_attention_of_several_chunks_is_scaled_unless_all_is_asked(self):
        for row in lines("--patterns", "a_shape", "--densities", "0.3")[HEADS:]:
            self.assertTrue(row["dense_scaled"])
            self.assertIsNotNone(row["last_mass"])

    def test_peers_stand_beside_rows_of_their_shape(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "peers.jsonl")
            peer = {"backend": "cudnn", "dtype": "bf16", "heads": HEADS, "kv_heads": KV_HEADS,
                    "head_dim": HEAD_DIM, "tokens": TOKENS, "seconds": 0.5, "tflops": 2.0}
            with open(path, "w", encoding="utf-8") as file:
                for line in (peer, dict(peer, tokens=1), dict(peer, dtype="fp16"),
                             dict(peer, backend="flash")):
                    file.write(json.dumps(line) + "\n")
            arguments = ("--patterns", "a_shape", "--densities", "0.3", "--peers", path)
            for row in lines(*arguments)[HEADS:]:
                self.assertEqual([p["backend"] for p in row["peers"]], ["cudnn", "flash"])
                by = row["peers"][0]
                self.assertEqual((by["ms"], by["tflops"]), (500, 2))
                self.assertAlmostEqual(by["speedup"], 500 / row["attend_ms"])
                self.assertAlmostEqual(by["rate_share"], row["tflops"] / 2)
                self.assertAlmostEqual(by["speedup_with_plan"],
                                       500 / (row["attend_ms"] + row["plan_ms"]))
            result = bench(*arguments)
            self.assertIn("by cudnn's 500.00 ms", result.stdout)

            with open(path, "a", encoding="utf-8") as file:
                file.write('{"backend": "cudnn"}\n')
            result = bench(*arguments)
            self.assertEqual(result.returncode, 1)
            for word in (path, "line 5", "dtype"):
                self.assertIn(word, result.stderr)

    def test_prints_a_table(self):
        result = bench("--patterns", "vertical_slash", "--densities", "0.4", "--dtype",
                       "fp16", "--mix")
        self.assertEqual(result.returncode, 0, result.stderr)
        for words in ("host: small, 8/2 heads of 64, fp16, 3000 tokens, heads: lines", "40.0%",
                      "vertical_slash", "by_kind", "mass 0.99", "diffuse", "GiB handed out"):
            self.assertIn(words, result.stdout)

    def test_refuses_what_it_cannot_do(self):
        for arguments, words in (
                (("--tokens", "100"), ("--tokens", "100", "256")),
                (("--shape", "gpt"), ("--shape", "gpt", "llama-3-8b")),
                (("--kinds", "round"), ("--kinds", "round", "diffuse")),
                (("--patterns", "dense"), ("--patterns", "dense", "a_shape")),
                (("--densities", "1.5"), ("--densities", "1.5")),
                (("--masses", "0"), ("--masses", "0")),
                (("--dtype", "fp32"), ("--dtype", "fp32", "bf16")),
                (("--device", "tpu"), ("--device", "tpu", "cuda")),
                (("--repetitions", "0"), ("--repetitions", "0")),
                (("--chunk-rows", "1000"), ("--chunk-rows", "1000", "128")),
                (("--device-bytes", "1000000"), ("1000000", "values of a made layer")),
                (("--peers", "/nonexistent"), ("--peers", "/nonexistent"))):
            result = bench(*arguments)
            self.assertNotEqual(result.returncode, 0, arguments)
            self.assertEqual(result.stdout, "")
            for word in words:
                self.assertIn(word, result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", required=True, help="the program")
    known, rest = parser.parse_known_args()
    BENCH = known.bench
    unittest.main(argv=[sys.argv[0], *rest])
