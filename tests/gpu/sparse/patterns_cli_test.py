#!/usr/bin/python3
"""quarry-patterns as its user meets it: files, pictures, errors and exit statuses."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import unittest

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "models")
TINY = os.path.join(MODELS, "tiny", "llama3-rope")
PROGRAM = None


class PatternsTest(unittest.TestCase):
    def run_patterns(self, *arguments):
        return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120,
                              check=False)

    def assert_fails(self, result, *words):
        self.assertEqual(result.returncode, 1, result)
        for word in words:
            self.assertIn(word, result.stderr)

    def test_searches_writes_and_shows(self):
        with tempfile.TemporaryDirectory() as directory:
            output, again, image = (os.path.join(directory, name)
                                    for name in ("p.json", "again.json", "p.png"))
            made = ["--model", TINY, "--made-tokens", "700", "--seed", "5", "--rows", "20",
                    "--tiles-share", "0.5", "--max-error", "10"]
            result = self.run_patterns(*made, "--output", output, "--image", image)
            self.assertEqual(result.returncode, 0, result)
            with open(os.path.join(TINY, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            with open(output, encoding="utf-8") as file:
                text = file.read()
            patterns = json.loads(text)
            self.assertEqual(patterns["model"], "llama3-rope")
            self.assertEqual(patterns["layers"], config["num_hidden_layers"])
            self.assertEqual(patterns["heads"], config["num_attention_heads"])
            for layer in patterns["patterns"]:
                self.assertEqual(len(layer), patterns["heads"])
                for head in layer:
                    self.assertNotEqual(head["pattern"], "dense")
                    self.assertLessEqual(head["expected"]["tiles_share"], 0.5)
            with open(image, "rb") as file:
                self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")
            # The same again, a layer at a time.
            result = self.run_patterns(*made, "--layers-at-a-time", "1", "--output", again)
            self.assertEqual(result.returncode, 0, result)
            with open(again, encoding="utf-8") as file:
                self.assertEqual(file.read(), text)
            shown = self.run_patterns("--show", output)
            self.assertEqual(shown.returncode, 0, shown)
            self.assertEqual(shown.stdout.splitlines()[-1], result.stdout.splitlines()[-1])

    def test_errors_name_what_is_wrong(self):
        self.assert_fails(self.run_patterns(), "--model")
        self.assert_fails(self.run_patterns("--model", TINY), "--made-tokens")
        made = ["--model", TINY, "--made-tokens", "50"]
        self.assert_fails(self.run_patterns(*made, "--tiles-share", "2"), "tiles_share 2")
        self.assert_fails(self.run_patterns(*made, "--max-error", "-1"), "max_error -1")
        self.assert_fails(self.run_patterns(*made, "--output", "/nowhere/p.json"), "/nowhere/p.json")
        self.assert_fails(self.run_patterns("--model", TINY, "--prompt-ids", "1,x"), '"x"')
        self.assert_fails(self.run_patterns("--model", TINY, "--prompt-ids", "99999999"), "99999999")
        self.assert_fails(self.run_patterns("--show", TINY + "/config.json"), "config.json")
        sliding = os.path.join(MODELS, "tiny", "phi3-sliding-window")
        self.assert_fails(self.run_patterns("--model", sliding, "--made-tokens", "50"), "UNIMPLEMENTED")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    options, rest = parser.parse_known_args()
    PROGRAM = options.program
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
