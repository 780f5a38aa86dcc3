#!/usr/bin/python3
"""codec_bench at small sizes: its lines have what they promise, and its errors are those of codecs."""
import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest

BENCH = None
TOKENS, HEAD_DIM, POSITIONS = 2048, 64, 4
SMALL = ("--bytes", str(16 << 20), "--tokens", "2048", "--pairs", "2", "--queries", "1", "3")


def bench(*arguments):
    return subprocess.run([BENCH, *arguments], capture_output=True, text=True, timeout=200,
                          check=False)


def lines(*arguments):
    result = bench("--json", *arguments)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def write_trace(path):
    """One head whose keys and queries are noise, as a safetensors file of fp32."""
    state = 1

    def noise(count):
        nonlocal state
        for _ in range(count):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            yield (state >> 40) / 2**23 - 1
    shapes = {"k": ([TOKENS, 1, HEAD_DIM], "F32"), "v": ([TOKENS, 1, HEAD_DIM], "F32"),
              "q_train": ([0, 1, HEAD_DIM], "F32"), "q_train_pos": ([0], "I32"),
              "q": ([POSITIONS, 1, HEAD_DIM], "F32"), "q_pos": ([POSITIONS], "I32")}
    header, body = {"__metadata__": {"scale": "0.25", "model": "made", "layer": "0"}}, b""
    for name, (shape, dtype) in shapes.items():
        count = 1
        for each in shape:
            count *= each
        data = struct.pack(f"<{count}i", *range(TOKENS - count, TOKENS)) if dtype == "I32" \
            else struct.pack(f"<{count}f", *noise(count))
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)


class CodecBenchTest(unittest.TestCase):
    def test_rates_are_of_every_codec_and_batch(self):
        found = lines(*SMALL, "--threads", "1", "2", "--head-dims", str(HEAD_DIM))
        codecs = [line for line in found if line["bench"] == "codec"]
        self.assertEqual([line["codec"] for line in codecs], ["fp8", "int8", "int4"])
        self.assertEqual([line["coded_bytes_per_token"] for line in codecs], [132, 132, 76])
        for line in codecs:
            for rate in ("encode_gb_per_s", "decode_gb_per_s", "copy_gb_per_s"):
                self.assertGreater(line[rate], 0)
        attends = [line for line in found if line["bench"] == "coded_attend"]
        self.assertEqual([(line["codec"], line["threads"], line["queries"]) for line in attends],
                         [(codec, threads, queries) for codec in ("fp8", "int8", "int4")
                          for threads in (1, 2) for queries in (1, 3)])
        for line in attends:
            self.assertEqual(line["tokens"], 2048)
            self.assertGreater(line["us"], 0)
            self.assertLessEqual(line["share_p10"], line["share_of_roof"])
            self.assertLessEqual(line["time_of_bf16"], line["time_p90"])

    def test_errors_are_larger_with_fewer_bits(self):
        with tempfile.TemporaryDirectory() as directory:
            write_trace(os.path.join(directory, "made.safetensors"))
            found = {line["codec"]: line for line in lines("--traces", directory)}
        self.assertEqual(set(found), {"fp8", "int8", "int4"})
        for line in found.values():
            self.assertEqual((line["bench"], line["tokens"], line["answers"]),
                             ("codec_error", TOKENS, POSITIONS))
            self.assertGreater(line["o_mean"], 1e-4)
            self.assertLessEqual(line["o_p50"], line["o_max"])
        self.assertLess(found["int8"]["o_mean"], found["fp8"]["o_mean"])
        self.assertLess(found["fp8"]["o_mean"], found["int4"]["o_mean"])
        self.assertLess(found["int8"]["o_mean"], 0.05)

    def test_what_is_wrong_is_named(self):
        for arguments, word in ((("--codecs", "int5"), "int5"), (("--codecs", "none"), "none"),
                                (("--head-dims", "40"), "40"), (("--threads", "0"), "threads"),
                                (("--traces", "/no/such/place"), "/no/such/place")):
            result = bench(*arguments)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn(word, result.stdout + result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True)
    known, rest = parser.parse_known_args()
    BENCH = known.bench
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
