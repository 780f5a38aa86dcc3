#!/usr/bin/python3
"""Asks a small trained model about a long context whose K/V live in the daemon.

A context of records spread evenly over background text is prefilled once. Then questions about
records outside the worker's window are asked, in two modes:
- turns: one context; after each question its right answer is appended, whatever the model said;
- requests: each question is a request of its own that opens the context again, in worker
  processes that have never seen it, so that its prefix comes from the daemon (in whole blocks of
  256 tokens; the few tokens after the last one are computed again, attending everything).
Each mode runs with full attention in the worker (the reference; there a request is a fork, for it
has no shared store), through the daemon attending everything, and through the daemon attending at
most a quarter of the tokens. At the end a daemon is killed between two answers.

Needs Python 3 and the built programs, no packages. Starts its own daemon unless --socket is given.
"""
import argparse
import collections
import json
import os
import statistics
import sys
import time

from demo_text import KeyValueText, Vocabulary
from processes import Daemon, ProcessError, Worker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WINDOW_FIRST, WINDOW_LAST = 128, 512
ANSWER_TOKENS = 2
TURN_TOKENS = 5 + ANSWER_TOKENS
WANTED_ACCURACY = 0.97
VARIANTS = ("full", "daemon", "daemon_quarter")


def say(text):
    print(text, file=sys.stderr, flush=True)


def start_worker(arguments, socket, share=0):
    """Full attention without a socket; with one, at most `share` of the daemon's tokens if it is not 0."""
    options = ["--window-first", str(WINDOW_FIRST), "--window-last", str(WINDOW_LAST)]
    options += ["--attention", "daemon", "--socket", socket] if socket else ["--attention", "full"]
    if share:
        options += ["--budget-share", f"{share:.4f}"]
    return Worker(arguments.build, arguments.model_directory, *options)


class Tally:
    """What the questions of one variant and one mode came to."""

    def __init__(self):
        self.questions = self.correct = 0
        self.attended = self.in_reach = self.steps = 0
        self.bytes_moved = self.bytes_touched = 0
        self.answer_ms = []

    def add(self, right, answer):
        self.questions += 1
        self.correct += right
        self.steps += answer["head_steps"]
        self.attended += answer["tokens_attended_mean"] * answer["head_steps"]
        self.in_reach += answer["tokens_in_reach_mean"] * answer["head_steps"]
        self.bytes_moved += answer["bytes_moved"]
        self.bytes_touched += answer["bytes_touched"]

    def summary(self):
        steps = max(1, self.steps)
        return {"questions": self.questions, "correct": self.correct,
                "tokens_attended_mean": round(self.attended / steps, 1),
                "tokens_in_reach_mean": round(self.in_reach / steps, 1),
                "share_attended": round(self.attended / max(1, self.in_reach), 4),
                "bytes_moved_per_question": self.bytes_moved // max(1, self.questions),
                "bytes_read_by_daemon_per_question": self.bytes_touched // max(1, self.questions),
                "answer_ms_median": round(statistics.median(self.answer_ms), 2)}


class Demo:
    def __init__(self, arguments, socket):
        self.arguments, self.socket = arguments, socket
        vocabulary = Vocabulary(arguments.model_directory)
        self.text = KeyValueText(vocabulary, arguments.context, arguments.records, arguments.seed)
        self.asked = self.text.questions(arguments.questions, WINDOW_FIRST, WINDOW_LAST)
        self.max_tokens = arguments.context + TURN_TOKENS * (arguments.questions + 1)
        # A request's tokens: window and daemon's share together stay below a quarter.
        window = WINDOW_FIRST + WINDOW_LAST
        self.quarter_share = max(0.01, 0.97 * (0.25 * arguments.context - window) /
                                 (arguments.context - window))
        self.facts = {}

    def worker(self, variant):
        share = self.quarter_share if variant == "daemon_quarter" else 0
        return start_worker(self.arguments, None if variant == "full" else self.socket, share)

    def open(self, worker, tokens):
        return worker.call("open", tokens=tokens, max_tokens=self.max_tokens)

    def turns(self, worker, sequence):
        tally = Tally()
        for record in self.asked:
            answer = worker.call("ask", sequence=sequence, tokens=self.text.question(record),
                                 new=ANSWER_TOKENS, gold=record.answer)
            tally.answer_ms.append(answer["total_ms"])
            tally.add(answer["predicted"] == record.answer, answer)
        return tally

    def forks(self, worker, sequence):
        tally = Tally()
        for record in self.asked:
            answer = worker.call("ask", sequence=sequence, tokens=self.text.question(record),
                                 new=ANSWER_TOKENS, fork=True)
            tally.answer_ms.append(answer["total_ms"])
            tally.add(answer["predicted"] == record.answer, answer)
        return tally

    def requests(self, variant):
        """Every request opens the whole prompt; a few new worker processes share them."""
        tally, reused, first_ms = Tally(), [], []
        count = self.arguments.worker_processes
        for number in range(count):
            with self.worker(variant) as worker:
                for record in self.asked[number::count]:
                    opened = self.open(worker, self.text.tokens)
                    answer = worker.call("ask", sequence=opened["sequence"],
                                         tokens=self.text.question(record), new=ANSWER_TOKENS)
                    worker.call("close", sequence=opened["sequence"])
                    reused.append(opened["reused_tokens"])
                    first_ms.append(opened["ttft_ms"] + answer["ttft_ms"])
                    tally.answer_ms.append(opened["ttft_ms"] + answer["total_ms"])
                    tally.add(answer["predicted"] == record.answer, answer)
                    tally.bytes_moved += opened["bytes_moved"]
        return tally, min(reused), statistics.median(first_ms)

    def run_full(self):
        say(f"full attention: prefilling {len(self.text.tokens)} tokens in the worker")
        with self.worker("full") as worker:
            opened = self.open(worker, self.text.tokens)
            say(f"full attention: {opened['ttft_ms'] / 1000:.1f} s; asking {len(self.asked)} "
                "questions on forks, then as turns")
            requests = self.forks(worker, opened["sequence"])
            turns = self.turns(worker, opened["sequence"])
            held = worker.call("stats")
        self.facts["full"] = {"ttft_cold_ms": opened["ttft_ms"],
                              "worker_kv_bytes": held["worker_kv_bytes"], "daemon_kv_bytes": 0}
        return {"turns": turns, "requests": requests}

    def run_daemon(self, variant):
        say(f"{variant}: turns in one context")
        with self.worker(variant) as worker:
            opened = self.open(worker, self.text.tokens)
            turns = self.turns(worker, opened["sequence"])
            held = worker.call("stats")
        facts = {"ttft_first_open_ms": opened["ttft_ms"], "first_open_reused": opened["reused_tokens"],
                 "bytes_moved_first_open": opened["bytes_moved"],
                 "worker_kv_bytes": held["worker_kv_bytes"], "daemon_kv_bytes": held["daemon_kv_bytes"]}
        say(f"{variant}: requests in {self.arguments.worker_processes} new worker processes")
        requests, facts["reused_tokens"], facts["ttft_reused_ms"] = self.requests(variant)
        self.facts[variant] = facts
        return {"turns": turns, "requests": requests}

    def run(self):
        tallies = {"full": self.run_full()}
        for variant in VARIANTS[1:]:
            tallies[variant] = self.run_daemon(variant)
        if self.facts["daemon"]["first_open_reused"]:
            say("note: this daemon had the context already, so the first open was not cold")
        return tallies


def run_kill(arguments):
    """Kills a daemon between two answers: what happens to the rest."""
    say("killing a daemon in the middle")
    vocabulary = Vocabulary(arguments.model_directory)
    text = KeyValueText(vocabulary, 2048, 64, arguments.seed)
    asked = text.questions(6, WINDOW_FIRST, WINDOW_LAST)
    outcome = {"answered_before": 0, "right_before": 0, "answered_after": 0, "failed_after": 0,
               "statuses_after": [], "slowest_failure_ms": 0.0}
    with Daemon(arguments.build) as daemon, start_worker(arguments, daemon.socket) as worker:
        opened = worker.call("open", tokens=text.tokens, max_tokens=4096)
        for number, record in enumerate(asked):
            if number == len(asked) // 2:
                daemon.kill()
            began = time.monotonic()
            answer = worker.try_call("ask", sequence=opened["sequence"],
                                     tokens=text.question(record), new=ANSWER_TOKENS,
                                     gold=record.answer)
            ok = answer["status"] == "OK"
            if number < len(asked) // 2:
                outcome["answered_before"] += ok
                outcome["right_before"] += ok and answer["predicted"] == record.answer
                continue
            outcome["answered_after"] += ok
            outcome["failed_after"] += not ok
            outcome["statuses_after"].append(answer["status"])
            outcome["slowest_failure_ms"] = max(outcome["slowest_failure_ms"],
                                                round((time.monotonic() - began) * 1e3, 1))
    outcome["loud"] = (outcome["answered_before"] == len(asked) // 2 and
                       outcome["answered_after"] == 0)
    return outcome


def result(arguments, demo, tallies, kill):
    summaries = {variant: {mode: tally.summary() for mode, tally in modes.items()}
                 for variant, modes in tallies.items()}
    correct = {variant: sum(mode.correct for mode in modes.values())
               for variant, modes in tallies.items()}
    questions = sum(mode.questions for mode in tallies["daemon"].values())
    quarter = tallies["daemon_quarter"].values()
    facts = demo.facts
    return {
        "model": arguments.model,
        "context_tokens": len(demo.text.tokens),
        "questions": questions,
        "correct_full": correct["full"],
        "correct_daemon": correct["daemon"],
        "correct_daemon_quarter": correct["daemon_quarter"],
        "reused_tokens": facts["daemon"]["reused_tokens"],
        "ttft_cold_ms": round(facts["daemon"]["ttft_first_open_ms"], 1),
        "ttft_reused_ms": round(facts["daemon"]["ttft_reused_ms"], 1),
        "worker_kv_bytes": facts["daemon"]["worker_kv_bytes"],
        "daemon_kv_bytes": facts["daemon"]["daemon_kv_bytes"],
        "tokens_attended_mean": round(sum(t.attended for t in quarter) /
                                      max(1, sum(t.steps for t in quarter)), 1),
        "seed": arguments.seed,
        "records": arguments.records,
        "window": [WINDOW_FIRST, WINDOW_LAST],
        "wanted_accuracy_reached": correct["full"] >= WANTED_ACCURACY * questions,
        "details": {"variants": summaries, "facts": facts, "killed_daemon": kill},
    }


def table(outcome):
    variants, facts = outcome["details"]["variants"], outcome["details"]["facts"]
    kill = outcome["details"]["killed_daemon"]

    def row(name, *cells):
        return f"{name:<44}" + "".join(f"{cell:>16}" for cell in cells)

    def each(function):
        return [function(variant) for variant in VARIANTS]

    def mib(count):
        return f"{count / 2**20:.1f} MiB"

    def kib(count):
        return f"{count / 2**10:.0f} KiB"

    lines = [
        f"{outcome['model']}: {outcome['context_tokens']} tokens, {outcome['records']} records, "
        f"seed {outcome['seed']}, window {WINDOW_FIRST} + {WINDOW_LAST}",
        "",
        row("", "full attention", "daemon, all", "daemon, <= 1/4"),
    ]
    for mode in ("turns", "requests"):
        of = collections.defaultdict(dict, {v: variants[v][mode] for v in VARIANTS})
        lines += [
            row(f"{mode}: answers right",
                *each(lambda v: f"{of[v]['correct']} of {of[v]['questions']}")),
            row(f"{mode}: tokens attended, mean",
                *each(lambda v: f"{of[v]['tokens_attended_mean']:.0f}")),
            row(f"{mode}: share of the tokens in reach",
                *each(lambda v: f"{100 * of[v]['share_attended']:.1f}%")),
            row(f"{mode}: worker <-> daemon, per question",
                *each(lambda v: kib(of[v]["bytes_moved_per_question"]))),
            row(f"{mode}: K/V read in the daemon, per question",
                *each(lambda v: mib(of[v]["bytes_read_by_daemon_per_question"]))),
            row(f"{mode}: time per question, median",
                *each(lambda v: f"{of[v]['answer_ms_median']:.0f} ms")),
        ]
    first = facts["daemon"]
    lines += [
        row("time to first token, cold", f"{facts['full']['ttft_cold_ms']:.0f} ms",
            f"{first['ttft_first_open_ms']:.0f} ms", "-"),
        row("time to first token, prefix reused, median", "-",
            *(f"{facts[v]['ttft_reused_ms']:.0f} ms" for v in VARIANTS[1:])),
        row("tokens reused", "-", *(facts[v]["reused_tokens"] for v in VARIANTS[1:])),
        row("K/V held by the worker", *each(lambda v: mib(facts[v]["worker_kv_bytes"]))),
        row("K/V held by the daemon", *each(lambda v: mib(facts[v]["daemon_kv_bytes"]))),
        "",
        f"Daemon killed in the middle: {kill['answered_before']} answers before; after it "
        f"{kill['answered_after']} answered, {kill['failed_after']} failed "
        f"({', '.join(sorted(set(kill['statuses_after'])))}; the slowest after "
        f"{kill['slowest_failure_ms']:.0f} ms).",
    ]
    if not outcome["wanted_accuracy_reached"]:
        lines.append(f"This model answers {outcome['correct_full']} of {outcome['questions']} with full "
                     f"attention: it is below the {100 * WANTED_ACCURACY:.0f}% that are wanted.")
    return "\n".join(lines)


def failures(outcome, require_accuracy):
    """What this run shows to be broken; empty when it is what the demo claims."""
    quarter = outcome["details"]["variants"]["daemon_quarter"]
    found = []
    # What the model can do is not the daemon's doing; what it loses through the daemon is.
    lost = outcome["correct_full"] - outcome["correct_daemon"]
    if lost > (1 - WANTED_ACCURACY) * outcome["questions"]:
        found.append(f"{lost} of {outcome['questions']} right answers were lost through the daemon")
    for field in ("correct_full", "correct_daemon", "correct_daemon_quarter"):
        if require_accuracy and outcome[field] < WANTED_ACCURACY * outcome["questions"]:
            found.append(f"{field} is {outcome[field]} of {outcome['questions']}")
    if not outcome["details"]["killed_daemon"]["loud"]:
        found.append("answers went on after the daemon was killed, or failed before")
    for mode, summary in quarter.items():
        if summary["share_attended"] > 0.25:
            found.append(f"{mode}: {100 * summary['share_attended']:.1f}% of the tokens were attended "
                         "where at most 25% were allowed")
    if outcome["reused_tokens"] < outcome["context_tokens"] // 256 * 256 - 256:
        found.append(f"only {outcome['reused_tokens']} of {outcome['context_tokens']} tokens were reused")
    return found


def parse_arguments():
    parser = argparse.ArgumentParser(description="asks a model about a context that the daemon holds")
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"),
                        help="build folder with the programs")
    parser.add_argument("--model", default="llama-a", help="a folder of tests/models")
    parser.add_argument("--seed", type=int, default=1, help="of the context and the questions")
    parser.add_argument("--context", type=int, default=16400, help="tokens of the context")
    parser.add_argument("--records", type=int, default=256, help="records in the context")
    parser.add_argument("--questions", type=int, default=64, help="in each mode")
    parser.add_argument("--worker-processes", type=int, default=4, help="new ones, sharing the requests")
    parser.add_argument("--socket", help="of a running daemon; its own otherwise")
    parser.add_argument("--require-accuracy", action="store_true",
                        help="fail when a column is below the wanted share of right answers")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object, alone on the last line of standard output")
    arguments = parser.parse_args()
    arguments.model_directory = os.path.join(ROOT, "tests", "models", arguments.model)
    if arguments.context < 4 * (WINDOW_FIRST + WINDOW_LAST) + 512:
        parser.error(f"--context {arguments.context} leaves nothing for a quarter outside the window")
    if not os.path.exists(os.path.join(arguments.model_directory, "config.json")):
        parser.error(f"there is no model {arguments.model} in tests/models")
    for option in ("questions", "worker_processes"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(arguments, option)}: at least 1 is needed")
    for program in ("daemon/quarryd", "gpu/quarry-worker"):
        path = os.path.join(arguments.build, program)
        if not os.access(path, os.X_OK):
            parser.error(f"there is no program {path}: --build names the folder of the built ones")
    return arguments


def main():
    arguments = parse_arguments()
    say(f"model {arguments.model}, seed {arguments.seed}")
    began = time.monotonic()
    own = None
    try:
        own = None if arguments.socket else Daemon(arguments.build)
        demo = Demo(arguments, own.socket if own else arguments.socket)
        with demo.worker("daemon"):
            pass  # whether the daemon answers, before the long part
        outcome = result(arguments, demo, demo.run(), run_kill(arguments))
    except (ProcessError, ValueError) as error:
        sys.exit(f"demo: {error}")
    finally:
        if own:
            own.end()
    outcome["seconds"] = round(time.monotonic() - began, 1)
    print(table(outcome), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps(outcome), flush=True)
    broken = failures(outcome, arguments.require_accuracy)
    for line in broken:
        say(f"demo: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
