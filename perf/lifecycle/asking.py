"""One context: prefilled once into the daemon, then asked about by every method."""
import json
import os
import time
from typing import NamedTuple

from lifecycle.cells import FULL
from processes import ProcessError, Worker

INDEX_TIMEOUT_S = 600
FIRST_RUN_TOKEN = 128  # where the daemon's first run begins
BLOCK_TOKENS = 256
EVERYTHING = 1 << 30  # tokens of a window that holds any context


class Method(NamedTuple):
    """How a worker attends what is not the prompt."""
    name: str
    options: list
    everything: bool = False  # all K and V in the worker


def methods_of(errors, ks, unlimited):
    """Full attention first: what is asked later may have taught the indexes."""
    return [Method(FULL, [], True),
            *(Method(f"error-{error:g}", ["--budget-error", f"{error:g}"]) for error in errors),
            *(Method(f"k-{k}", ["--budget-k", str(k)]) for k in ks),
            *([Method("unlimited", [])] if unlimited else [])]


def runs_of(tokens, run_tokens):
    """Whole runs of a context."""
    return max(0, tokens - FIRST_RUN_TOKEN) // run_tokens


def wait_for_indexes(daemon, before, heads):
    """Until `heads` heads of runs more than at the statistics `before` have indexes, and nothing is
    learned again; how many indexes that made."""
    deadline = time.monotonic() + INDEX_TIMEOUT_S
    last = None
    while time.monotonic() < deadline:
        now = daemon.statistics()
        built = now["quarry_index_built_total"] - before["quarry_index_built_total"]
        failed = now["quarry_index_failed_total"] - before["quarry_index_failed_total"]
        if failed:
            raise ProcessError(f"{failed:.0f} heads got no index")
        idle = now["quarry_index_queued_runs_count"] == 0 and built == last
        if not heads or (idle and built >= heads):
            return int(built)
        last = built
        time.sleep(0.5)
    raise ProcessError(f"{heads} heads were not indexed in {INDEX_TIMEOUT_S} s")


def wait_until(daemon, what, reached):
    """Until reached(the daemon's statistics)."""
    deadline = time.monotonic() + INDEX_TIMEOUT_S
    while not reached(daemon.statistics()):
        if time.monotonic() > deadline:
            raise ProcessError(f"{what} took more than {INDEX_TIMEOUT_S} s")
        time.sleep(0.1)


class Asking:
    """The workers of one model on one daemon."""

    def __init__(self, build, model_directory, daemon, window, device):
        self.build, self.model_directory, self.daemon = build, model_directory, daemon
        self.window, self.device = window, device
        with open(os.path.join(model_directory, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.heads = config["num_hidden_layers"] * config["num_key_value_heads"]  # of a run, each with an index

    def worker(self, method):
        """Full attention holds all K and V itself, as it read them from the daemon, which attends nothing."""
        first, last = self.window
        return Worker(self.build, self.model_directory, "--socket", self.daemon.socket, "--device", self.device,
                      "--window-first", str(EVERYTHING if method.everything else first),
                      "--window-last", str(last), *method.options)

    def prefill(self, context, max_tokens, runs):
        """A worker that holds the context open, so that it stays indexed, and a row of what that took."""
        before = self.daemon.statistics()
        worker = self.worker(Method("prefill", []))
        try:
            opened = worker.call("open", tokens=context.tokens, max_tokens=max_tokens)
            start = time.monotonic()
            indexes = wait_for_indexes(self.daemon, before, runs * self.heads)
        except BaseException:
            worker.end()
            raise
        after = self.daemon.statistics()
        return worker, {
            "row": "context", "prefill_s": round(opened["ttft_ms"] / 1e3, 2),
            "index_wait_s": round(time.monotonic() - start, 2), "indexes": indexes,
            "index_core_s": round((after["quarry_index_build_micros_total"] -
                                   before["quarry_index_build_micros_total"]) / 1e6, 2),
            "index_bytes": after["quarry_index_bytes"], "kv_bytes": opened["daemon_kv_bytes"]}

    def ask(self, method, context, plan, max_tokens):
        """A row with all cells. Conversations and requests each have a worker process that has never
        seen the context; each of them is a fork of it there."""
        cells = {}
        with self._opened(method, context, max_tokens) as (worker, sequence):
            for conversation in plan.conversations:
                fork = worker.call("fork", sequence=sequence)["sequence"]
                for turn, question in enumerate(conversation, 1):
                    cells.setdefault(("turns", turn), Cell()).ask(worker, fork, question)
                worker.call("close", sequence=fork)
        with self._opened(method, context, max_tokens) as (worker, sequence):
            for question in plan.requests:
                fork = worker.call("fork", sequence=sequence)["sequence"]
                cells.setdefault(("requests", 0), Cell()).ask(worker, fork, question)
                worker.call("close", sequence=fork)
        return {"row": "answers", "method": method.name,
                "cells": [{"mode": mode, "turn": turn, **cell.summary()}
                          for (mode, turn), cell in cells.items()]}

    def _opened(self, method, context, max_tokens):
        return Opened(self.worker(method), context, max_tokens)


class Opened:
    """A worker with a context whose prefix came from the daemon, as a `with` statement."""

    def __init__(self, worker, context, max_tokens):
        self.worker = worker
        try:
            opened = worker.call("open", tokens=context.tokens, max_tokens=max_tokens)
            reusable = (len(context.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            if opened["reused_tokens"] != reusable:
                raise ProcessError(f"{opened['reused_tokens']} tokens were reused instead of {reusable}")
            self.sequence = opened["sequence"]
        except BaseException:
            worker.end()
            raise

    def __enter__(self):
        return self.worker, self.sequence

    def __exit__(self, *_):
        self.worker.end()


class Cell:
    """Answers to the questions of one mode and turn."""

    def __init__(self):
        self.right, self.answers = "", []

    def ask(self, worker, sequence, question):
        """Right if all tokens are. They are predicted behind the right ones, which changes nothing:
        greedy tokens are all right behind their own predecessors exactly if they are behind these."""
        answer = worker.call("ask", sequence=sequence, tokens=question.tokens, new=len(question.answer),
                             gold=question.answer)
        self.right += "01"[answer["predicted"] == question.answer]
        self.answers.append(answer)

    def summary(self):
        steps = sum(a["head_steps"] for a in self.answers)
        count = len(self.answers)

        def by_steps(name):
            return round(sum(a[name] * a["head_steps"] for a in self.answers) / steps, 1)

        return {"right": self.right, "tokens_attended": by_steps("tokens_attended_mean"),
                "tokens_in_reach": by_steps("tokens_in_reach_mean"),
                "bytes_read": sum(a["bytes_touched"] for a in self.answers) // count,
                "ms": round(sum(a["total_ms"] for a in self.answers) / count, 2)}
