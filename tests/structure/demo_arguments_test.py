#!/usr/bin/python3
"""What cannot work is said by the demo and the quick start before anything takes long."""
import argparse
import os
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = None


class DemoArgumentsTest(unittest.TestCase):
    def assert_refused(self, command, *words, status=2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(result.returncode, status, result)
        for word in words:
            self.assertIn(word, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotIn("prefilling", result.stderr)

    def demo(self, *arguments):
        return ["/usr/bin/python3", os.path.join(ROOT, "deploy", "demo.py"), "--build", BUILD, *arguments]

    def test_the_demo_names_what_is_wrong(self):
        self.assert_refused(self.demo("--build", "nosuch"), "nosuch/daemon/quarryd", "--build names")
        self.assert_refused(self.demo("--questions", "0"), "--questions 0")
        self.assert_refused(self.demo("--worker-processes", "0"), "--worker-processes 0")
        self.assert_refused(self.demo("--model", "nosuch"), "no model nosuch")
        self.assert_refused(self.demo("--questions", "1000"), "1000 questions are asked", status=1)

    def test_the_demo_connects_before_it_computes(self):
        self.assert_refused(self.demo("--socket", "/nonexistent/sock"), "/nonexistent/sock", status=1)

    def test_the_quick_start_checks_before_it_builds(self):
        script = [os.path.join(ROOT, "deploy", "quickstart.sh"), "--skip-install"]
        for option, value, words in (("--model", "nosuch", "no model 'nosuch'"), ("--model", "", "no model ''"),
                                     ("--seed", "x", "--seed 'x'"), ("--questions", "0", "--questions '0'"),
                                     ("--questions", "-3", "--questions '-3'")):
            self.assert_refused([*script, option, value], words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", required=True)
    known, rest = parser.parse_known_args()
    BUILD = os.path.abspath(known.build)
    unittest.main(argv=[sys.argv[0], *rest])
