#!/usr/bin/python3
"""What the documents name must exist: paths, programs, options, code.

- A word in backquotes or in an `sh` block that begins like a path of this tree is one.
- A command of an `sh` block begins with a path or a program that is there.
- An option given to one of our programs is in its --help.
- A --gtest_filter, and what is given to ctest as -L or -R or named as its labels, matches a test.
- A `cpp` or `c` block is, to the letter, a part of a file that install_test.py builds and runs.
"""
import argparse
import glob
import os
import re
import shlex
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
DOCUMENTS = ["README.md", "HACKING.md", "ARCHITECTURE.md", "CHANGELOG.md"]
PRESETS = ("dev", "release", "asan", "tsan", "cuda")
OUR_PROGRAMS = {"quarryd": "daemon/quarryd", "quarry": "client/quarry",
                "quarry-worker": "gpu/quarry-worker", "quarry-patterns": "gpu/quarry-patterns"}
SYSTEM_PROGRAMS = {"cmake", "ctest", "git", "cd", "sudo", "apt-get", "tar", "curl", "export"}
# Made by a command that the documents give, so not there before it.
MADE_LATER = re.compile(r"build/bundle(/|$)|build(/|/<preset>|/(dev|release|asan|tsan|cuda))?/?$")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """The commands of the sh blocks, as lists of words without comments and environment."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def path_words(text, top_level):
    """Words that begin with a file or folder of the tree's root, or with build/."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    words = [w for span in re.findall(r"`([^`\n]+)`", prose) for w in span.split()]
    words += [w for command in commands(text) for w in command]
    words += [w for _, w in re.findall(r"\[([^\]]*)\]\(([^)#]+)[^)]*\)", prose) if "://" not in w]
    for word in words:
        word = word.rstrip(".,:;)")
        if re.match(r"[A-Za-z0-9_.<>*/-]+$", word) and word.split("/")[0] in top_level | {"build"} \
                and ("/" in word or "." in word.strip(".")):
            yield word


def exists(word, build):
    if MADE_LATER.match(word):
        return True
    match = re.match(r"build/(<preset>|[a-z]+)/(.+)", word)
    if match:
        if match.group(1) not in PRESETS + ("<preset>",):
            return False
        base, rest = build, match.group(2)
    else:
        base, rest = ROOT, word
    # <version> and NAME stand for something.
    pattern = re.sub(r"<[^>]*>|\b[A-Z]+\b(?=$|/)", "*", rest.rstrip("/"))
    return os.path.exists(os.path.join(base, rest)) or bool(glob.glob(os.path.join(base, pattern)))


def ctest_choices(text):
    """Pairs of -L or -R and its argument, of ctest's commands and of comments that list labels."""
    choices = [(option, value) for words in commands(text) if words[0] == "ctest"
               for option, value in zip(words, words[1:]) if option in ("-L", "-R")]
    for labels in re.findall(r"# labels: ([a-z, ]+)$", text, re.M):
        choices += [("-L", f"^{label}$") for label in labels.split(", ")]
    return choices


class Help:
    """The --help of programs, asked once."""

    def __init__(self, build):
        self.build, self.known = build, {}

    def program(self, word):
        """The file behind a command's first word, None for a program of the system."""
        name = os.path.basename(word)
        if name in OUR_PROGRAMS and (word == name or word.startswith("build/") or "/bin/" in word):
            return os.path.join(self.build, OUR_PROGRAMS[name])
        if word.startswith("build/"):
            return os.path.join(self.build, *word.split("/")[2:])
        if os.path.exists(os.path.join(ROOT, word)) and "/" in word:
            return os.path.join(ROOT, word)
        return None

    def text(self, program, subcommand=()):
        key = (program, *subcommand)
        if key not in self.known:
            if program.endswith(".sh"):
                with open(program, encoding="utf-8") as file:
                    self.known[key] = file.read()
            else:
                done = subprocess.run([program, *subcommand, "--help"], capture_output=True,
                                      text=True, timeout=60, check=False)
                self.known[key] = done.stdout + done.stderr if done.returncode == 0 else None
        return self.known[key]


class DocumentsTest(unittest.TestCase):
    build = None

    def documents(self):
        return {d: read(d) for d in DOCUMENTS}

    def test_paths_exist(self):
        top_level = set(os.listdir(ROOT)) - {"build", ".git"}
        for name, text in self.documents().items():
            for word in path_words(text, top_level):
                self.assertTrue(exists(word, self.build), f"{name} names {word}, which does not exist")

    def test_commands_begin_with_programs(self):
        helps = Help(self.build)
        for name, text in self.documents().items():
            for words in commands(text):
                program = helps.program(words[0])
                known = words[0] in SYSTEM_PROGRAMS or (program and os.access(program, os.X_OK))
                self.assertTrue(known, f"{name}: the command `{' '.join(words)}` begins with no program")

    def test_options_are_known(self):
        helps = Help(self.build)
        for name, text in self.documents().items():
            spans = [s.split() for s in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text,
                                                                       flags=re.M | re.S))]
            for words in list(commands(text)) + [s for s in spans if s]:
                program = helps.program(words[0])
                if not any(w.startswith("--") for w in words[1:]) or not program or \
                        not os.path.isfile(program) or not os.access(program, os.X_OK):
                    continue
                self.check_options(helps, name, program, words)

    def check_options(self, helps, name, program, words):
        text = helps.text(program)
        self.assertIsNotNone(text, f"{name}: {words[0]} --help fails")
        if os.path.basename(program) == "quarry":
            values = {words[i + 1] for i, w in enumerate(words[:-1]) if w == "--socket"}
            subcommands = [w for w in words[1:] if not w.startswith("-") and w not in values][:1]
            if subcommands:
                own = helps.text(program, subcommands)
                self.assertIsNotNone(own, f"{name}: `{' '.join(words)}`: no command {subcommands[0]}")
                text += own
        if "gtest_filter" in " ".join(words):
            return
        for option in (w.split("=")[0] for w in words[1:] if w.startswith("--")):
            self.assertIn(option, text, f"{name}: `{' '.join(words)}`: {option} is unknown")

    def test_tests_are_there(self):
        for name, text in self.documents().items():
            for words in commands(text):
                for word in (w for w in words if w.startswith("--gtest_filter")):
                    listed = self.output(Help(self.build).program(words[0]), "--gtest_list_tests", word)
                    self.assertRegex(listed, r"(?m)^  ", f"{name}: {word} matches no test of {words[0]}")
            for choice in ctest_choices(text):
                found = self.output("ctest", "--test-dir", self.build, "-N", *choice)
                self.assertNotIn("Total Tests: 0\n", found, f"{name}: ctest {' '.join(choice)} finds no test")

    def output(self, *command):
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout

    def test_code_is_tested_code(self):
        tested = ""
        for path in glob.glob(os.path.join(HERE, "external", "*_engine.c*")):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            begin, end = text.index("// [README\n"), text.index("// README]")
            tested += text[begin + len("// [README\n"):end]
        shown = [b for text in self.documents().values()
                 for language in ("cpp", "c") for b in blocks(text, language)]
        self.assertGreaterEqual(len(shown), 3)
        for block in shown:
            self.assertIn(block, tested, "a document shows code that no test builds:\n" + block)


class CheckerTest(unittest.TestCase):
    """The checks catch what they are for."""

    def test_missing_path_is_caught(self):
        words = list(path_words("see `deploy/no_such_file.sh` and `storage/arena.h`.",
                                {"deploy", "storage"}))
        self.assertEqual([exists(w, "/nowhere") for w in words], [False, True])

    def test_missing_program_of_a_preset_is_caught(self):
        self.assertFalse(exists("build/dev/daemon/no_such_program", "/nowhere"))
        self.assertFalse(exists("build/nopreset/daemon/quarryd", "/nowhere"))

    def test_placeholders_match_something(self):
        self.assertTrue(exists("tests/models/NAME/config.json", "/nowhere"))
        self.assertFalse(exists("tests/models/NAME/no_such_file.json", "/nowhere"))

    def test_choices_of_tests_are_found(self):
        text = "```sh\nctest --preset dev -L unit   # labels: unit, fuzz\nctest --preset dev -R x_test\n```\n"
        self.assertEqual(ctest_choices(text),
                         [("-L", "unit"), ("-R", "x_test"), ("-L", "^unit$"), ("-L", "^fuzz$")])

    def test_commands_are_read_without_environment_and_comment(self):
        text = "```sh\nQUARRY_SIMD=avx2 build/dev/x --flag  # why\n```\n"
        self.assertEqual(list(commands(text)), [["build/dev/x", "--flag"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "dev"))
    known, rest = parser.parse_known_args()
    DocumentsTest.build = os.path.abspath(known.build)
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
