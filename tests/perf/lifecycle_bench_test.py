#!/usr/bin/python3
"""lifecycle_bench.py: its contexts and questions, what a small run leaves behind, and its verdicts."""
import argparse
import collections
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "perf"))
import lifecycle_bench
from demo_text import Vocabulary
from lifecycle import cells, table, text
from processes import Worker

LLAMA = os.path.join(ROOT, "tests", "models", "llama-a")
SMALL = ("--models", "llama-a", "--tasks", "kv2", "--lengths", "2048", "--answers", "8", "--per-context", "8",
         "--run-tokens", "512", "--index", "clusters", "--seed", "7")
MODES = [("turns", turn) for turn in range(1, 6)] + [("requests", 0)]
BUILD = None


class TextTest(unittest.TestCase):
    """Every answer is found again in the text, by other means than those that made it."""

    def setUp(self):
        self.vocabulary = Vocabulary(LLAMA)
        self.special = self.vocabulary.special

    def context(self, task, length=4096, seed="3"):
        context = text.make_context(self.vocabulary, task, length, seed, 128, 512)
        self.assertEqual(len(context.tokens), length + 1)
        return context

    def records(self, context, name, size):
        """What follows each symbol of this name; none of it is in the window."""
        places = [i for i, token in enumerate(context.tokens) if token == self.special[name]]
        self.assertGreaterEqual(min(places), 128)
        self.assertLessEqual(max(places) + 1 + size, len(context.tokens) - 512)
        return [context.tokens[i + 1:i + 1 + size] for i in places]

    def test_key_values(self):
        for task, keys in (("kv1", 1), ("kv2", 2)):
            context = self.context(task)
            records = self.records(context, "K", keys + 3)
            self.assertEqual(len(records), 256)
            for question in context.questions:
                key = question.tokens[2:-1]
                self.assertEqual([r[keys + 1:] for r in records if r[:keys] == key], [question.answer])

    def test_prefix_and_suffix(self):
        context = self.context("ps")
        records = self.records(context, "SEP", 6)
        for question in context.questions:
            self.assertIn(question.answer, records)
            self.assertEqual(question.tokens[2:4] + question.tokens[5:7],
                             question.answer[:2] + question.answer[4:])

    def test_chains(self):
        context = self.context("vt")
        after = {r[-1]: r[0] for r in self.records(context, "VAR", 3) if r[-1] != self.special["NUM"]}
        first = {r[3]: r[0] for r in self.records(context, "VAR", 4) if r[2] == self.special["NUM"]}
        for question in context.questions:
            names = [first[question.tokens[2]]]
            while names[-1] in after:
                names.append(after[names[-1]])
            self.assertEqual(question.answer, names + [self.special["END"]])

    def test_hops(self):
        context = self.context("hop")
        after = {a: b for a, _, b in self.records(context, "K", 3)}
        for question in context.questions:
            _, _, hops, name, _ = question.tokens
            self.assertEqual(len(question.answer), hops - self.vocabulary.ranges["numerals"].start)
            for answer in question.answer:
                name = after[name]
                self.assertEqual(answer, name)

    def test_examples(self):
        context = self.context("icl")
        examples = self.records(context, "EX", 10)
        for question in context.questions:
            features = set(question.tokens[1:9])
            alike = max(examples, key=lambda e: len(features & set(e[:8])))
            self.assertIn(question.answer[0], {e[9] for e in examples})
            self.assertGreaterEqual(len(features & set(alike[:8])), 4)

    def test_many_examples_with_wrong_labels(self):
        """The answer is what two thirds of the class have; all others have one other label."""
        context = self.context("icl-wide")
        examples = self.records(context, "EX", 10)
        self.assertEqual(len(examples), (4096 - 1024) // 11)
        self.assertEqual(len({e[9] for e in examples}), 4 + 4)

        near = 0
        for question in context.questions:
            answer, = question.answer
            places = zip(*(e[:8] for e in examples if e[9] == answer))
            features = {collections.Counter(place).most_common(1)[0][0] for place in places}
            own = [e[9] for e in examples if len(features & set(e[:8])) >= 4]
            (usual, most), (_, others), *_ = collections.Counter(own).most_common()
            self.assertEqual(usual, answer)
            self.assertAlmostEqual(most / len(own), 2 / 3, delta=0.05)
            self.assertAlmostEqual(others / len(own), 1 / 3, delta=0.05)
            near += len(features & set(question.tokens[1:9])) >= 4
        self.assertGreater(near, 0.9 * len(context.questions))

    def test_lists(self):
        context = self.context("mf")
        values = sorted(v for v, in self.records(context, "LST", 1))
        self.assertEqual({q.tokens[1]: q.answer for q in context.questions},
                         {self.special["MAX"]: [values[-1]], self.special["MIN"]: [values[0]],
                          self.special["SND"]: [values[-2]]})

    def test_copies(self):
        context = self.context("copy")
        runs = self.records(context, "COPY", 8)
        for question in context.questions:
            self.assertEqual([r[2:] for r in runs if r[:2] == question.tokens[1:]], [question.answer])

    def test_the_seed_decides(self):
        for task in text.TASKS:
            self.assertEqual(self.context(task), self.context(task))
            self.assertNotEqual(self.context(task), self.context(task, seed="4"))

    def test_no_question_comes_twice_in_a_conversation_or_a_cell(self):
        for task in text.TASKS:
            plan = text.make_plan(self.context(task), 60)
            wanted = {"mf": 3, "vt": 60, "ps": 60}.get(task, 60)
            self.assertEqual(len(plan.requests), min(wanted, len(plan.conversations)))
            for group in plan.conversations + [plan.requests] + list(zip(*plan.conversations)):
                self.assertEqual(len(group), len(set(map(repr, group))))


class RunTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.out = os.path.join(directory.name, "rows")

    def run_bench(self, *more):
        """Its exit status and standard output."""
        out, log = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
            status = lifecycle_bench.main([*SMALL, "--build", BUILD, "--out", self.out, *more])
        return status, out.getvalue()

    def test_a_run_and_what_goes_on_from_it(self):
        status, printed = self.run_bench()
        self.assertEqual(status, 0, printed)
        self.check_rows(cells.read(self.out))
        for mode, turn in MODES:
            self.assertRegex(printed, rf"llama-a +2048 +kv2 +{mode} +{turn} +error-0.005 +8 .* holds")
        self.assertRegex(printed, r"\| llama-a \| 2048 \| kv2 \| 4\d/48 \| 4\d/48, ")
        self.check_full_attention()
        self.check_resumption()

    def check_rows(self, rows):
        context, answers = rows[0], {row["method"]: row for row in rows[1:]}
        self.assertEqual([row["row"] for row in rows], ["context"] + 3 * ["answers"])
        self.assertEqual(context["indexes"], 3 * 5 * 2)  # runs, layers, KV heads
        self.assertEqual(list(answers), ["full", "error-0.005", "k-128"])
        for method, row in answers.items():
            self.assertEqual([(c["mode"], c["turn"]) for c in row["cells"]], MODES)
            for full, cell in zip(answers["full"]["cells"], row["cells"]):
                self.assertEqual(len(cell["right"]), 8)
                self.assertEqual(cell["tokens_in_reach"], full["tokens_in_reach"])
                self.assertEqual(cell["bytes_read"] > 0, method != "full")
        right = "".join(cell["right"] for cell in answers["full"]["cells"])
        self.assertGreaterEqual(right.count("1"), 46, right)
        for cell in answers["full"]["cells"]:
            self.assertEqual(cell["tokens_attended"], cell["tokens_in_reach"])
        for cell in answers["k-128"]["cells"]:
            self.assertLessEqual(cell["tokens_attended"], 128 + 128 + 512 + 8)

    def check_full_attention(self):
        """It answers what a worker without a daemon answers."""
        context = text.make_context(Vocabulary(LLAMA), "kv2", 2048, "7/2048/kv2/0", 128, 512)
        plan = text.make_plan(context, 8)
        with Worker(BUILD, LLAMA, "--attention", "full") as worker:
            sequence = worker.call("open", tokens=context.tokens, max_tokens=2560)["sequence"]
            right = ""
            for question in plan.requests:
                answer = worker.call("ask", sequence=sequence, tokens=question.tokens, new=2, fork=True)
                right += "01"[answer["predicted"] == question.answer]
        row = next(row for row in cells.read(self.out) if row.get("method") == "full")
        self.assertEqual(row["cells"][-1]["right"], right)

    def check_resumption(self):
        with open(self.out, "rb+") as file:
            whole = file.read()
            file.truncate(len(whole) - 10)
        self.run_bench()
        rows = cells.read(self.out)
        self.assertEqual([row.get("method") for row in rows],
                         [None, "full", "error-0.005", None, "k-128"])  # the last line was asked again
        with open(self.out, "rb") as file:
            before = file.read()
        self.assertTrue(before.startswith(whole[:whole.rfind(b"\n", 0, -1)]))
        _, printed = self.run_bench("--json")
        with open(self.out, "rb") as file:
            self.assertEqual(file.read(), before)  # nothing is left to ask
        self.assertEqual(len([json.loads(line) for line in printed.splitlines()]), 18)
        self.run_bench("--seed", "8", "--limit-minutes", "0")
        with open(self.out, "rb") as file:
            self.assertEqual(file.read(), before)  # no time


class WrongFilesTest(unittest.TestCase):
    """What lifecycle_bench has not written is refused, and left as it is."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name

    def refused(self, *arguments):
        """The one line that is said."""
        log = io.StringIO()
        with contextlib.redirect_stderr(log), self.assertRaises(SystemExit) as caught:
            lifecycle_bench.main([*SMALL, "--limit-minutes", "0", *arguments])
        self.assertEqual(caught.exception.code, 2)
        self.assertRegex(log.getvalue(), r"\Alifecycle_bench: .*\n\Z")
        return log.getvalue()

    def write(self, content):
        path = os.path.join(self.directory, "file")
        with open(path, "wb") as file:
            file.write(content)
        return path

    def test_foreign_files(self):
        row = VerdictTest().row("full", 1)
        own = json.dumps(row, separators=(",", ":")).encode()
        del row["index"]
        for content in (b"a line without its end", b"one\ntwo", b'{"a":1}', b'{"a":1}\n', b"[]\n", b"\xff\n", b"\n",
                        json.dumps(row).encode() + b"\n", own + b"\nremarks"):
            path = self.write(content)
            for arguments in (("--build", BUILD, "--out", path), ("--table", path)):
                self.assertIn(path, self.refused(*arguments))
            with open(path, "rb") as file:
                self.assertEqual(file.read(), content)

    def test_paths(self):
        self.assertIn("Is a directory", self.refused("--build", BUILD, "--out", self.directory))
        self.assertIn("Is a directory", self.refused("--table", self.directory))
        self.assertIn("/none", self.refused("--build", BUILD, "--out", self.directory + "/none/rows"))
        self.assertIn("/none", self.refused("--table", self.directory + "/none"))
        self.assertIn("--build", self.refused("--build", self.directory))
        self.assertIn("no model gpt", self.refused("--build", BUILD, "--models", "gpt"))


class VerdictTest(unittest.TestCase):
    def row(self, method, right, n=300):
        cell = {"mode": "turns", "turn": 1, "right": "1" * right + "0" * (n - right), "tokens_attended": 1,
                "tokens_in_reach": 1, "bytes_read": 1, "ms": 1}
        return {"model": "m", "row": "answers", "task": "t", "length": 1, "context": 0, "method": method,
                "seed": 1, "per_context": n, "window": [1, 1], "run_tokens": 1, "index": "auto", "device": "host",
                "cells": [cell]}

    def verdict(self, full, right, n=300):
        outcome = table.Outcome([self.row("full", full, n), self.row("error-0.05", right, n)], 300)
        self.assertIn("error-0.05", outcome.text())
        return outcome.rows[1]["verdict"]

    def test_of_300_answers_three_may_be_lost(self):
        self.assertEqual(self.verdict(300, 297), "holds")
        self.assertEqual(self.verdict(300, 296), "loses")

    def test_cells_that_full_attention_fails_are_listed(self):
        self.assertEqual(self.verdict(180, 180), "holds")
        self.assertEqual(self.verdict(179, 179), "listed")

    def test_too_few_answers(self):
        self.assertEqual(self.verdict(299, 299, 299), "short")

    def test_answers_are_paired(self):
        full, other = self.row("full", 200), self.row("error-0.05", 200)
        other["cells"][0]["right"] = "0" * 5 + "1" * 200 + "0" * 95
        row = table.Outcome([full, other], 300).rows[1]
        self.assertEqual((row["lost"], row["won"], row["ratio"]), (5, 5, 1.0))
        self.assertAlmostEqual(row["chance"], 638 / 1024)

    def test_a_lost_cell_is_the_exit_status(self):
        with tempfile.NamedTemporaryFile("w") as file:
            for right, status in ((297, 0), (296, 1)):
                file.seek(0)
                file.truncate()
                for row in (self.row("full", 300), self.row("error-0.005", right)):
                    file.write(json.dumps(row) + "\n")
                file.flush()
                with contextlib.redirect_stdout(io.StringIO()):
                    self.assertEqual(lifecycle_bench.main(["--table", file.name]), status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", required=True, help="folder of the built programs")
    known, rest = parser.parse_known_args()
    BUILD = known.build
    unittest.main(argv=[sys.argv[0], *rest])
