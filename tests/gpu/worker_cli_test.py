#!/usr/bin/python3
"""quarry-worker as its user meets it: arguments, answers, errors and exit statuses."""
import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")
LLAMA = os.path.join(MODELS, "llama-a")
WORKER = None
DEVICE = "host"


def golden(path):
    """The integer tensors of a golden file."""
    with open(path, "rb") as file:
        data = file.read()
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name in ("prompt", "greedy"):
        low, high = header[name]["data_offsets"]
        count = (high - low) // 4
        tensors[name] = list(struct.unpack(f"<{count}i", data[8 + length + low:8 + length + high]))
    return tensors


def header(path):
    """The header of a safetensors file."""
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


class WorkerTest(unittest.TestCase):
    def run_worker(self, *arguments, model=LLAMA, **options):
        return subprocess.run([WORKER, "--model", model, *arguments], capture_output=True, text=True,
                              timeout=120, check=False, **options)

    def assert_fails(self, result, *words):
        self.assertEqual(result.returncode, 1, result)
        for word in words:
            self.assertIn(word, result.stderr)

    def test_generates_the_oracles_tokens(self):
        for name in ("n1", "n17"):
            tensors = golden(os.path.join(MODELS, "goldens", "llama-a", name + ".safetensors"))
            ids = ",".join(map(str, tensors["prompt"]))
            common = ["--attention", "full", "--kv-dtype", "fp32", "--ignore-eos", "--device", DEVICE]
            result = self.run_worker("--prompt-ids", ids, "--max-new-tokens", "20", *common)
            self.assertEqual(result.returncode, 0, result)
            self.assertEqual(list(map(int, result.stdout.split())), tensors["greedy"][:20])
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(tensors["prompt"], file)
                file.flush()
                result = self.run_worker("--prompt-ids", "@" + file.name, "--max-new-tokens", "5",
                                         "--json", *common)
            answer = json.loads(result.stdout)
            self.assertEqual(answer["status"], "OK")
            self.assertEqual(answer["predicted"], tensors["greedy"][:5])

    def test_takes_and_answers_text_where_the_model_has_a_tokenizer(self):
        with open(os.path.join(MODELS, "tokenizer", "golden.json"), encoding="utf-8") as file:
            case = json.load(file)["cases"][1]
        with tempfile.TemporaryDirectory() as model:
            tiny = os.path.join(MODELS, "tiny", "llama3-rope")
            for path in (os.path.join(tiny, "config.json"), os.path.join(tiny, "model.safetensors"),
                         os.path.join(MODELS, "tokenizer", "tokenizer.model")):
                os.symlink(os.path.abspath(path), os.path.join(model, os.path.basename(path)))
            common = ["--attention", "full", "--kv-dtype", "fp32", "--max-new-tokens", "8",
                      "--ignore-eos", "--json"]
            text = self.run_worker("--prompt", case["text"], *common, model=model)
            ids = self.run_worker("--prompt-ids", " ".join(map(str, case["ids"])), *common,
                                  model=model)
        self.assertEqual(text.returncode, 0, text)
        answer = json.loads(text.stdout)
        self.assertEqual(answer["predicted"], json.loads(ids.stdout)["predicted"])
        self.assertTrue(answer["text"])

    def test_sampling_repeats_with_its_seed(self):
        arguments = ["--attention", "full", "--prompt-ids", "1 5 9", "--max-new-tokens", "12",
                     "--temperature", "5", "--ignore-eos"]
        outputs = [self.run_worker(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2")]
        self.assertEqual(len(outputs[0].split()), 12)
        self.assertEqual(outputs[0], outputs[1])
        self.assertNotEqual(outputs[0], outputs[2])

    def test_gold_tokens_take_the_place_of_generated_ones(self):
        common = ["--attention", "full", "--prompt-ids", "1 5 9", "--ignore-eos", "--json"]
        free = json.loads(self.run_worker(*common, "--max-new-tokens", "3").stdout)
        gold = json.loads(self.run_worker(*common, "--gold-ids", "700,800,900").stdout)
        self.assertEqual(gold["predicted"][0], free["predicted"][0])
        self.assertEqual(len(gold["predicted"]), 3)
        self.assertEqual(gold["tokens"], 6)  # the last one was fed, too

    def test_runs_with_its_weights_elsewhere_or_in_another_form(self):
        tensors = golden(os.path.join(MODELS, "goldens", "llama-a", "n17.safetensors"))
        common = ["--attention", "full", "--kv-dtype", "fp32", "--ignore-eos", "--device", DEVICE,
                  "--prompt-ids", ",".join(map(str, tensors["prompt"])), "--max-new-tokens", "8"]
        for option in (["--weights", "resident"], ["--weights", "streamed"],
                       ["--weights-dtype", "int8"],
                       ["--weights-dtype", "int8", "--weights", "streamed"]):
            result = self.run_worker(*common, *option)
            self.assertEqual(result.returncode, 0, result)
            self.assertEqual(list(map(int, result.stdout.split())), tensors["greedy"][:8])
        result = self.run_worker(*common, "--weights-dtype", "int4")
        self.assertEqual(result.returncode, 0, result)
        self.assertEqual(len(result.stdout.split()), 8)
        result = self.run_worker("--attention", "full", "--serve", "--weights", "streamed",
                                 input='{"op":"stats"}')
        stats = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual(stats["weights_resident_bytes"], 0)
        self.assertGreater(stats["weights_streamed_bytes"], 0)

    def test_writes_layers_as_traces(self):
        with tempfile.TemporaryDirectory() as parent:
            directory = os.path.join(parent, "new", "traces")
            result = self.run_worker(
                "--attention", "full", "--prompt-ids", ",".join(map(str, range(300, 400))),
                "--gold-ids", "700,800,900", "--dump-kv", directory, "--dump-layers", "0,3",
                "--dump-queries", "10")
            self.assertEqual(result.returncode, 0, result)
            self.assertEqual(sorted(os.listdir(directory)),
                             ["layer-00.safetensors", "layer-03.safetensors"])
            trace = header(os.path.join(directory, "layer-03.safetensors"))
        self.assertEqual(trace["__metadata__"]["model"], "llama-a")
        self.assertEqual(trace["__metadata__"]["layer"], "3")
        self.assertAlmostEqual(float(trace["__metadata__"]["scale"]), 128 ** -0.5, 7)
        shapes = {name: tensor["shape"] for name, tensor in trace.items() if name != "__metadata__"}
        # The prompt's last token begins the decode: 99 of the prompt, 4 decoded.
        self.assertEqual(shapes, {"k": [103, 2, 128], "v": [103, 2, 128],
                                  "q_train": [74, 6, 128], "q_train_pos": [74],
                                  "q": [4, 6, 128], "q_pos": [4]})
        self.assertEqual(trace["k"]["dtype"], "BF16")

    def test_prefills_by_a_pattern_file(self):
        def patterns(heads, head):
            return json.dumps({"format": "quarry.prefill-patterns.v1", "model": "m", "layers": 5,
                               "heads": heads, "patterns": [[head] * heads] * 5})
        prompt = ("--attention", "full", "--prompt-ids", ",".join(map(str, range(300, 900))),
                  "--max-new-tokens", "3", "--ignore-eos")
        dense = self.run_worker(*prompt)
        self.assertEqual(dense.returncode, 0, dense)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            def run(text):
                file.seek(0)
                file.truncate()
                file.write(text)
                file.flush()
                return self.run_worker(*prompt, "--prefill-patterns", file.name)
            whole = run(patterns(6, {"pattern": "a_shape", "sinks": 0, "local": 600}))
            self.assertEqual(whole.returncode, 0, whole)
            self.assertEqual(whole.stdout, dense.stdout)
            part = run(patterns(6, {"pattern": "a_shape", "sinks": 0, "local": 1}))
            self.assertEqual(part.returncode, 0, part)
            self.assert_fails(run(patterns(4, {"pattern": "dense"})), "patterns of 5 layers of 4 heads")
            self.assert_fails(run(patterns(6, {"pattern": "wave"})), file.name, "patterns[0][0].pattern")
        self.assert_fails(self.run_worker(*prompt, "--prefill-patterns", "/nonexistent/p"),
                          "/nonexistent/p")

    def test_tells_its_version(self):
        result = subprocess.run([WORKER, "--version"], capture_output=True, text=True, timeout=60,
                                check=False)
        self.assertEqual(result.returncode, 0, result)
        self.assertRegex(result.stdout, r"^\d+\.\d+\.\d+\n$")

    def test_says_what_is_wrong(self):
        full = ("--attention", "full")
        self.assert_fails(self.run_worker(*full, "--prompt", "text"), "tokenizer.model", "token ids")
        self.assert_fails(self.run_worker(*full), "prompt is empty")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1,two"), "token id 1", '"two"')
        for word in ("5x", "99999999999", "-1"):
            self.assert_fails(self.run_worker(*full, "--prompt-ids", "1,2," + word), f'token id 2, "{word}"')
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "@/nonexistent/ids"),
                          "/nonexistent/ids", "No such file")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "@/tmp"), "cannot read /tmp",
                          "Is a directory")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1,2048,3"), "2048", "token 1 ")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1,5,99999"), "99999", "token 2 ")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1,2", "--max-tokens", "200000"),
                          "200000", "131072")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1", model="/nonexistent"),
                          "/nonexistent/config.json")
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1", "--device-bytes", "1000000"),
                          "1000000")
        for mode, word in (("resident", "resident weights take"), ("streamed", "at a time")):
            self.assert_fails(self.run_worker(*full, "--prompt-ids", "1", "--weights", mode,
                                              "--device-bytes", "1000000"), word, "1000000")
        # Whether it was built without CUDA, has no driver or less than 100 cards.
        self.assert_fails(self.run_worker(*full, "--prompt-ids", "1", "--device", "cuda:99"),
                          "FAILED_PRECONDITION", "CUDA")
        for device in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x"):
            result = self.run_worker(*full, "--prompt-ids", "1", "--device", device)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("not host, cuda or cuda:N", result.stderr)
        self.assert_fails(self.run_worker("--socket", "/nonexistent/sock", "--prompt-ids", "1"),
                          "/nonexistent/sock", "--socket or QUARRY_SOCKET")
        self.assert_fails(self.run_worker("--prompt-ids", "1",
                                          env={**os.environ, "QUARRY_SOCKET": "/nonexistent/other"}),
                          "/nonexistent/other")
        dump = (*full, "--prompt-ids", "1,2", "--dump-kv")
        self.assert_fails(self.run_worker(*dump, "/tmp", "--dump-layers", "1,5"), "layer 5", "5 layers")
        self.assert_fails(self.run_worker(*dump, "/dev/null/traces"), "/dev/null/traces")
        self.assert_fails(self.run_worker(*dump, "/tmp", "--serve"), "--serve")
        self.assert_fails(self.run_worker(*dump, "/tmp", "--gold-ids", "7,x"), "token id 1")
        failed = self.run_worker(*full, "--json", "--prompt-ids", "1,2,3", "--max-tokens", "2")
        self.assert_fails(failed, "quarry-worker: FAILED_PRECONDITION: ")
        self.assertEqual(json.loads(failed.stdout)["status"], "FAILED_PRECONDITION")
        for arguments in (("--attention", "some"), ("--kv-dtype", "int4"), ("--budget-share", "2"), ("--query-samples", "4097"),
                          ("--budget-share", "0"), ("--budget-mass", "nan"), ("--budget-error", "nan"), ("--budget-beta", "nan"),
                          ("--budget-share", "nan"), ("--budget-lift", "0"), ("--budget-share", "0.5", "--budget-k", "8"),
                          ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "nan"), ("--temperature", "nan"), ("--weights", "some"),
                          ("--weights-dtype", "int3"),
                          ("--no-such-option",), ("--dump-kv", ""), ("--dump-queries", "5"),
                          ("--dump-layers", "1"), ("--dump-seed", "1")):
            result = self.run_worker(*arguments, "--prompt-ids", "1")
            self.assertNotEqual(result.returncode, 0)
            self.assertIn(arguments[0].lstrip("-"), result.stderr + result.stdout)

    def test_serves_lines_until_its_input_ends(self):
        requests = ['{"op":"open","tokens":[1,5,9],"max_tokens":50}',
                    '{"op":"ask","sequence":1,"tokens":[4],"new":3}', "nonsense",
                    '{"op":"close","sequence":1}', '{"op":"stats"}']
        result = self.run_worker("--attention", "full", "--serve", input="\n".join(requests))
        self.assertEqual(result.returncode, 0, result)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertTrue(lines[0]["ready"])
        self.assertEqual(lines[0]["vocab"], 2048)
        self.assertEqual([line["status"] for line in lines],
                         ["OK", "OK", "OK", "INVALID_ARGUMENT", "OK", "OK"])
        self.assertEqual(len(lines[2]["predicted"]), 3)
        self.assertEqual(lines[-1]["worker_kv_bytes"], 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True, help="the program")
    parser.add_argument("--device", default="host", help="where it computes the oracle's tokens")
    known, rest = parser.parse_known_args()
    WORKER, DEVICE = known.worker, known.device
    unittest.main(argv=[sys.argv[0], *rest])
