#!/usr/bin/env python3
"""Decoding behind a context that is larger than the daemon's RAM, against the same context in RAM.

A reference model's context of key-value records (--task) is prefilled into a daemon that has room for all of it and a
disk. Its questions are then asked token by token: there, and, for each of --pages, in a daemon on the same disk whose
arena holds no more than what lies behind the context's last run and what questions add, and that has so much room for
pages of the disk, as a share of the context. Prints a JSON line for each: how many answers were right, how many as in RAM, ms a token, and of a token the
pages that attention wanted and the share of them that was in RAM. The first --warm questions are not counted.
Method and figures: perf/README.md.

Needs Python 3.9 or later and the built programs, no packages. Starts daemons of its own.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path += [os.path.join(ROOT, "deploy"), os.path.join(ROOT, "perf")]
# pylint: disable=wrong-import-position
from demo_text import Vocabulary
from lifecycle.asking import Asking, Method, Opened, runs_of, wait_until
from lifecycle.text import TASKS, make_context
from processes import Daemon, ProcessError

MODELS = os.path.join(ROOT, "tests", "models")
WINDOW = (128, 512)
RUN_TOKENS = 8192
ROOM = 512  # tokens that a question may add
PAGE_BYTES = 4096


def say(text):
    print(text, file=sys.stderr, flush=True)


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def pages(daemon):
    """Wanted and there, wanted and read, bytes there."""
    statistics = daemon.statistics()
    return [statistics[f"quarry_disk_page_{name}"] for name in ("hits_total", "reads_total", "bytes")]


class Bench:
    def __init__(self, settings, directory):
        self.settings = settings
        self.disk = os.path.join(directory, "kv.quarry")
        self.model = os.path.join(MODELS, settings.model)
        self.context = make_context(Vocabulary(self.model), settings.task, settings.tokens,
                                    f"{settings.seed}/{settings.tokens}", *WINDOW)
        self.questions = self.context.questions[:settings.warm + settings.questions]
        self.method = Method("daemon", ["--budget-error", f"{settings.budget_error:g}", "--deadline-ms", "60000"])
        self.in_ram = None  # answers

    def daemon(self, arena_bytes, disk_bytes, page_bytes):
        return Daemon(self.settings.build, f"{arena_bytes}B",
                      f"[engine]\nextent_bytes = \"8MiB\"\nrun_tokens = {RUN_TOKENS}\n[index]\nkind = \"clusters\"\n[disk]\npath = \"{self.disk}\"\n"
                      f"bytes = \"{disk_bytes}B\"\npage_bytes = \"{page_bytes}B\"\n")

    def asking(self, daemon):
        return Asking(self.settings.build, self.model, daemon, WINDOW, "host")

    def run(self):
        with open(os.path.join(self.model, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        layers = config["num_hidden_layers"]
        kv_bytes = 4 * layers * config["num_key_value_heads"] * self.head_dim(config) * self.settings.tokens
        disk_bytes = 4 * kv_bytes + (1 << 30)
        runs = runs_of(self.settings.tokens, RUN_TOKENS)
        with self.daemon(2 * kv_bytes + (256 << 20), disk_bytes, 0) as daemon:
            asking = self.asking(daemon)
            holder, cost = asking.prefill(self.context, self.settings.tokens + ROOM, runs)
            say(f"prefill {cost['prefill_s']} s, {cost['indexes']} indexes after {cost['index_wait_s']} s")
            with holder:
                self.measure(asking, {"where": "ram", "kv_bytes": kv_bytes})
            wait_until(daemon, "the indexes' place on the disk",
                       lambda now: now["quarry_index_saved_layers_total"] >= runs * layers)
            subprocess.run([os.path.join(self.settings.build, "client", "quarry"), "--socket", daemon.socket, "flush"],
                           check=True, stdout=subprocess.DEVNULL)
        # What no run holds is in RAM, and what questions add.
        blocks = (self.settings.tokens - 128 - runs * RUN_TOKENS) // 256 + 2 + 8 * (ROOM // 256 + 1)
        arena_bytes = blocks * 256 * kv_bytes // self.settings.tokens
        for share in self.settings.pages:
            page_bytes = int(share * kv_bytes)
            with self.daemon(arena_bytes, disk_bytes, page_bytes) as daemon:
                asking = self.asking(daemon)
                # Runs are attached, and their indexes loaded, while somebody has the context.
                with Opened(asking.worker(self.method), self.context, self.settings.tokens + ROOM):
                    wait_until(daemon, "the indexes from the disk",
                               lambda now: now["quarry_index_loaded_layers_total"] >= runs * layers)
                    self.measure(asking, {"where": "disk", "kv_bytes": kv_bytes, "arena_bytes": arena_bytes,
                                          "page_bytes": page_bytes})

    @staticmethod
    def head_dim(config):
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def measure(self, asking, row):
        """Every question in a fork of the context, its tokens and the right answer's one by one."""
        times, answers, before = [], [], None
        with Opened(asking.worker(self.method), self.context, self.settings.tokens + ROOM) as (worker, sequence):
            for number, question in enumerate(self.questions):
                if number == self.settings.warm:
                    times, before = [], pages(asking.daemon)
                fork = worker.call("fork", sequence=sequence)["sequence"]
                predicted = []
                for token in question.tokens + question.answer[:-1]:
                    answer = worker.call("ask", sequence=fork, tokens=[token], new=1)
                    predicted += answer["predicted"]
                    times.append(answer["total_ms"])
                answers.append(predicted[-len(question.answer):])
                worker.call("close", sequence=fork)
        hits, reads, there = pages(asking.daemon)
        hits, reads = hits - before[0], reads - before[1]
        self.in_ram = self.in_ram or answers
        counted = list(zip(answers, self.in_ram, self.questions))[self.settings.warm:]
        print(json.dumps({
            "model": self.settings.model, "tokens": self.settings.tokens, "budget_error": self.settings.budget_error, **row,
            "questions": len(counted), "right": sum(mine == question.answer for mine, _, question in counted),
            "as_in_ram": sum(mine == ram for mine, ram, _ in counted),
            "ms_p50": round(quantile(times, 0.5), 3), "ms_p99": round(quantile(times, 0.99), 3),
            "ms_mean": round(sum(times) / len(times), 3), "pages_wanted": round((hits + reads) / len(times)),
            "in_ram_share": round(hits / max(1, hits + reads), 4),
            "read_bytes": round(reads * PAGE_BYTES / len(times)), "pages_bytes": there}), flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--model", default="llama-a", choices=("llama-a", "phi3-b"))
    parser.add_argument("--task", default="kv2", choices=list(TASKS))
    parser.add_argument("--tokens", type=int, default=32768, help="of the context; a multiple of 256")
    parser.add_argument("--pages", nargs="+", type=float, default=[1, 0.25, 0.0625], metavar="SHARE",
                        help="of the context's K and V that may be in RAM as pages")
    parser.add_argument("--budget-error", type=float, default=0.005, help="tolerated")
    parser.add_argument("--questions", type=int, default=40, help="that are counted")
    parser.add_argument("--warm", type=int, default=8, help="that are asked before")
    parser.add_argument("--directory", help="for the disk's file, on the disk to be measured; it is removed")
    parser.add_argument("--seed", type=int, default=1)
    settings = parser.parse_args(arguments)
    if settings.tokens % 256:
        parser.error("--tokens is a multiple of 256")
    return settings


def main(arguments=None):
    settings = parse(arguments)
    directory = tempfile.mkdtemp(prefix="quarry-paged-", dir=settings.directory)
    try:
        Bench(settings, directory).run()
    except (OSError, ProcessError, subprocess.CalledProcessError) as error:
        say(f"paged_bench: {error}")
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
