#!/usr/bin/env python3
"""Asks the reference models about long contexts whose K/V live in the daemon: is anything lost?

Cells are model x length x task x sharing mode x turn. In conversations of five turns the right answer is
appended after each question; requests are questions of their own about the same context. The same
contexts and questions, drawn from --seed, are asked with full attention in the worker, through the daemon under
a tolerated error, and through it under a fixed k. Appends JSON lines to --out and goes on where that
file ends; --table FILE prints what it has. Method and figures: perf/README.md.

Needs Python 3.9 or later and the built programs, no packages. Starts a daemon of its own.
"""
import argparse
import json
import os
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path += [os.path.join(ROOT, "deploy"), os.path.join(ROOT, "perf")]
# pylint: disable=wrong-import-position
from demo_text import Vocabulary
from lifecycle.asking import FIRST_RUN_TOKEN, Asking, methods_of, runs_of
from lifecycle.cells import SETTINGS, ForeignFile, Results, read
from lifecycle.table import Outcome
from lifecycle.text import TASKS, make_context, make_plan
from processes import Daemon, ProcessError

MODELS = os.path.join(ROOT, "tests", "models")
TURN_ROOM = 512  # tokens that a conversation may add to its context


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text):
    say(f"lifecycle_bench: {text}")
    sys.exit(2)


class Bench:
    def __init__(self, settings, results):
        self.settings, self.results = settings, results
        self.methods = methods_of(settings.budget_error, settings.budget_k, settings.unlimited)
        self.end = time.monotonic() + 60 * settings.limit_minutes

    def out_of_time(self):
        return time.monotonic() > self.end

    def run(self):
        """False: the time was up before everything was done."""
        for length in self.settings.lengths:
            for task in self.settings.tasks:
                for model in self.settings.models:
                    if not self.run_task(model, task, length):
                        return False
        return True

    def run_task(self, model, task, length):
        """Contexts, one by one, until every cell has its answers."""
        vocabulary = Vocabulary(os.path.join(MODELS, model))
        asked = number = 0
        while asked < self.settings.answers:
            context = make_context(vocabulary, task, length, f"{self.settings.seed}/{length}/{task}/{number}",
                                   *self.settings.window)
            plan = make_plan(context, self.settings.per_context)
            asked += len(plan.requests)
            missing = [method for method in self.methods
                       if not self.results.has(model, task, length, number, method.name)]
            if missing:
                if self.out_of_time():
                    return False
                self.run_context((model, task, length, number), context, plan, missing)
            number += 1
        return True

    def run_context(self, where, context, plan, methods):
        model, task, length, number = where
        names = {"model": model, "task": task, "length": length, "context": number}
        max_tokens = length + TURN_ROOM
        runs = runs_of(length, self.settings.run_tokens)
        if self.settings.index == "exact":
            runs = 0  # that are indexed
        with Daemon(self.settings.build, f"{self.settings.arena_mib}MiB", self.configuration()) as daemon:
            asking = Asking(self.settings.build, os.path.join(MODELS, model), daemon, self.settings.window,
                            self.settings.device)
            holder, cost = asking.prefill(context, max_tokens, runs)
            with holder:
                self.results.add({**names, **cost})
                say(f"{model} {task} {length} #{number}: prefill {cost['prefill_s']} s, {cost['indexes']} indexes "
                    f"after {cost['index_wait_s']} s")
                for method in methods:
                    start = time.monotonic()
                    row = asking.ask(method, context, plan, max_tokens)
                    self.results.add({**names, **row})
                    right = "".join(cell["right"] for cell in row["cells"])
                    say(f"  {method.name}: {right.count('1')} of {len(right)} right in "
                        f"{time.monotonic() - start:.0f} s")

    def configuration(self):
        return (f"[engine]\nrun_tokens = {self.settings.run_tokens}\n"
                f"first_run_token = {FIRST_RUN_TOKEN}\n[index]\nkind = \"{self.settings.index}\"\n")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--out", help="JSON lines; what is there under the same settings is not asked again")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only print the table of these")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of the table")
    parser.add_argument("--models", nargs="+", default=["llama-a", "phi3-b"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768],
                        help="tokens of a context; multiples of 256")
    parser.add_argument("--answers", type=int, default=300, help="that a cell needs at least")
    parser.add_argument("--per-context", type=int, default=60, help="conversations, and requests, at most")
    parser.add_argument("--budget-error", nargs="*", type=float, default=[0.005],
                        help="tolerated, of the adaptive budget; each is a method; none: leave it out")
    parser.add_argument("--budget-k", nargs="*", type=int, default=[128],
                        help="of the fixed budget; each is a method; none: leave it out")
    parser.add_argument("--unlimited", action="store_true", help="the daemon without a budget, too")
    parser.add_argument("--window", nargs=2, type=int, default=[128, 512], help="first and last tokens")
    parser.add_argument("--run-tokens", type=int, default=8192, help="of the daemon's runs")
    parser.add_argument("--index", default="auto", help="kind of the runs' indexes",
                        choices=("auto", "exact", "codes", "clusters", "graph"))
    parser.add_argument("--device", default="host", help="of the workers: host, cuda or cuda:N")
    parser.add_argument("--arena-mib", type=int, default=1024, help="of the daemon's K and V")
    parser.add_argument("--seed", type=int, default=int(time.strftime("%Y%m%d")),
                        help="of contexts and questions; the date by default")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"),
                        help="begin no other context after so long")
    settings = parser.parse_args(arguments)
    if any(length % 256 for length in settings.lengths):
        parser.error("lengths are multiples of 256 tokens")
    if settings.index == "auto" and settings.run_tokens < 8192:
        parser.error("shorter runs than 8192 tokens are indexed only by a kind of index that is named")
    return settings


def check_paths(settings):
    for program in ("daemon/quarryd", "gpu/quarry-worker", "client/quarry"):
        path = os.path.join(settings.build, program)
        if not os.access(path, os.X_OK):
            fail(f"there is no program {path}: --build names the folder of the built ones")
    for model in settings.models:
        if not os.path.exists(os.path.join(MODELS, model, "config.json")):
            fail(f"there is no model {model} in {MODELS}")


def ask(settings):
    """The rows of --out, or of this run alone, when everything is asked or the time is up."""
    check_paths(settings)
    results = Results(settings.out, {name: getattr(settings, name) for name in SETTINGS})
    # As an exception, so that the daemon and the workers are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("lifecycle_bench: ended by a signal"))
    say(f"seed {settings.seed}")
    if not Bench(settings, results).run():
        say("the time is up; the same command goes on")
    return results.rows


def main(arguments=None):
    """0; 1 if a counted cell loses under the adaptive budget; 2 if it cannot be told."""
    settings = parse(arguments)
    try:
        rows = [row for path in settings.table for row in read(path)] if settings.table else ask(settings)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except (ForeignFile, ProcessError, ValueError) as error:
        fail(error)
    outcome = Outcome(rows, settings.answers)
    print("\n".join(map(json.dumps, outcome.rows)) if settings.json else outcome.text(), flush=True)
    return int(any(outcome.of(f"error-{error:g}", "loses") for error in settings.budget_error))


if __name__ == "__main__":
    sys.exit(main())
