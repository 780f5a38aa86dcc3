#!/usr/bin/env python3
"""Decoding behind long contexts: with the K/V in the daemon, and with all of them in the worker's memory.

A model of --shape with random weights (made in --models, 2 bytes a weight) takes a prompt of random tokens, once for
each length; then every method generates --new-tokens, one request a token, behind the same context: `full` attends all
K/V in the device's memory, as read from the daemon; `paged` all of them in the host's, over the link, token by token;
`alone` has them on the device without a daemon, behind a prefill of its own;
`device` and `host` have them in the daemon, with rows sent by the one or the other (quarry-worker --rings). --batch
contexts decode together: of the one prompt, which the daemon holds once, or with --distinct each of its own. Prints a
JSON line for each: ms a step (a token of every context), what the device's memory held at most, bytes that the daemon
read a step and the mean of its time for a layer (from a request seen to its answer written), bytes of K/V in the worker.
Method and figures: perf/README.md.

Needs Python 3.9 or later and the built programs, no packages. Starts a daemon of its own.
"""
import argparse
import json
import os
import random
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path += [os.path.join(ROOT, "deploy"), os.path.join(ROOT, "perf")]
# pylint: disable=wrong-import-position
from decode.random_model import SHAPES, head_dim_of, write_model
from lifecycle.asking import EVERYTHING, runs_of, wait_for_indexes
from processes import Daemon, ProcessError, Worker

RUN_TOKENS = 8192  # the daemon's default
WARM_UP = 4  # tokens of a method that are not timed
EVERYTHING_HERE = ("full", "paged", "alone")
METHODS = {"full": ["--window-first", str(EVERYTHING)], "alone": ["--attention", "full"],
           "paged": ["--window-first", str(EVERYTHING), "--local-kv", "host"],
           "device": ["--rings", "device"], "host": ["--rings", "host"]}


def say(text):
    print(text, file=sys.stderr, flush=True)


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def attends(daemon):
    """Attends that the daemon has answered, and the seconds that they took it."""
    statistics = daemon.statistics()
    return [statistics[f"quarry_shm_attend_latency_seconds_{name}"] for name in ("count", "sum")]


class Bench:
    def __init__(self, settings):
        self.settings = settings
        name = f"{settings.shape}-{settings.layers or 'all'}-{max(settings.tokens) + settings.room}"
        self.model = os.path.join(settings.models, name)
        if not os.path.exists(os.path.join(self.model, "config.json")):
            start = time.monotonic()
            write_model(self.model, settings.shape, settings.layers, max(settings.tokens) + settings.room,
                        settings.seed)
            say(f"{self.model} written in {time.monotonic() - start:.0f} s")
        with open(os.path.join(self.model, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)

    def worker(self, daemon, method, budget=()):
        settings = self.settings
        device_bytes = settings.full_bytes if method in ("full", "alone") else settings.device_bytes
        return Worker(settings.build, self.model, "--socket", daemon.socket, "--device", settings.device,
                      "--device-bytes", str(device_bytes), "--deadline-ms", "120000", *settings.worker,
                      *METHODS[method], *budget)

    def run(self, tokens):
        settings, config = self.settings, self.config
        heads = config["num_hidden_layers"] * config["num_key_value_heads"]  # of a run, each with an index
        draw = random.Random(settings.seed)
        prompts = [[draw.randrange(3, config["vocab_size"]) for _ in range(tokens)]
                   for _ in range(max(settings.batch) if settings.distinct else 1)]
        kv_bytes = 4 * heads * head_dim_of(config) * (tokens * len(prompts) + settings.room * max(settings.batch))
        engine = "".join(f"{line}\n" for line in [f"executor_threads = {settings.executor_threads}", *settings.engine])
        with Daemon(settings.build, f"{int(1.1 * kv_bytes) + (1 << 30)}B",
                    f"[engine]\n{engine}[index]\nthreads = {settings.index_threads}\n"
                    f"max_bytes = \"{kv_bytes // 2 + (1 << 30)}B\"\n") as daemon:
            before = daemon.statistics()
            with self.worker(daemon, "host") as worker:
                opened = [worker.call("open", tokens=prompt, max_tokens=tokens + settings.room) for prompt in prompts]
                start = time.monotonic()
                wait_for_indexes(daemon, before, len(prompts) * runs_of(tokens, RUN_TOKENS) * heads)
                self.print(tokens, {"method": "prefill", "prompts": len(prompts),
                                    "s": round(sum(one["ttft_ms"] for one in opened) / 1e3, 2),
                                    "indexes_wait_s": round(time.monotonic() - start, 2)}, worker)
                for method in settings.methods:
                    for batch in settings.batch:
                        self.measure(daemon, method, [prompts[i % len(prompts)] for i in range(batch)])

    def measure(self, daemon, method, prompts):
        settings = self.settings
        budget = [] if method in EVERYTHING_HERE else settings.budget
        tokens = len(prompts[0])
        with self.worker(daemon, method, budget) as worker:
            sequences = [worker.call("open", tokens=prompt, max_tokens=tokens + settings.room)["sequence"]
                         for prompt in prompts]
            next_tokens = [5 + i for i in range(len(prompts))]
            times, read, warm = [], 0, None
            for i in range(WARM_UP + settings.new_tokens):
                if i == WARM_UP:
                    warm = attends(daemon)
                asks = [{"sequence": sequence, "tokens": [token], "new": 1}
                        for sequence, token in zip(sequences, next_tokens)]
                answers = worker.call("batch", asks=asks)["answers"]
                for answer in answers:
                    if answer["status"] != "OK":
                        raise ProcessError(f"{method}: {answer['status']}: {answer['error']}")
                next_tokens = [answer["predicted"][0] for answer in answers]
                if i >= WARM_UP:
                    times.append(max(answer["total_ms"] for answer in answers))
                    read += sum(answer["bytes_touched"] for answer in answers)
            answered, seconds = (now - then for now, then in zip(attends(daemon), warm))
            self.print(tokens, {
                "method": method, "budget": " ".join(budget), "batch": len(prompts), "distinct": settings.distinct,
                "ms_p50": round(quantile(times, 0.5), 3), "ms_p99": round(quantile(times, 0.99), 3),
                "ms_mean": round(sum(times) / len(times), 3),
                "tokens_per_s": round(1e3 * len(prompts) * len(times) / sum(times), 1),
                "new_tokens": len(times), "daemon_bytes_read": read // len(times),
                "daemon_us_mean": round(1e6 * seconds / answered, 1) if answered else 0,
                "kv_bytes": sum(answer["worker_kv_bytes"] for answer in answers)}, worker)

    def print(self, tokens, row, worker):
        stats = worker.call("stats")
        row = {"shape": self.settings.shape, "layers": self.config["num_hidden_layers"], "tokens": tokens, **row,
               "device": stats["device"],
               **{name: stats[name] for name in ("device_peak_bytes", "device_overhead_bytes", "device_mapped_bytes",
                                                 "device_driver_used_bytes", "weights_resident_bytes",
                                                 "weights_streamed_bytes", "weights_spare_bytes")}}
        print(json.dumps(row), flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "cuda"))
    parser.add_argument("--models", default="/tmp/quarry-models", help="folder that models are made in")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=0, help="0: the shape's")
    parser.add_argument("--tokens", nargs="+", type=int, default=[131072], help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="that are timed")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="contexts that decode together")
    parser.add_argument("--distinct", action="store_true", help="contexts of prompts of their own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budget", nargs="*", default=["budget-error=0.02"], metavar="OPTION=VALUE",
                        help="of the daemon's part, as quarry-worker has it, without dashes in front")
    parser.add_argument("--device", default="cuda", help="host, cuda or cuda:N")
    parser.add_argument("--device-bytes", type=int, default=16 << 30, help="but for the methods full and alone")
    parser.add_argument("--full-bytes", type=int, default=96 << 30, help="of the methods full and alone")
    parser.add_argument("--worker", nargs="*", default=[], metavar="OPTION=VALUE",
                        help="more for every worker, without dashes in front: weights-dtype=int8")
    parser.add_argument("--engine", nargs="*", default=[], metavar="KEY = VALUE",
                        help="more lines of the daemon's [engine] section: \"task_tokens = 1024\"")
    parser.add_argument("--index-threads", type=int, default=os.cpu_count(), help="of the daemon")
    parser.add_argument("--executor-threads", type=int, default=max(1, os.cpu_count() - 4),
                        help="of the daemon; they spin while a token is in work, as its poller does, and so does the worker")
    parser.add_argument("--seed", type=int, default=1)
    settings = parser.parse_args(arguments)
    settings.worker = [f"--{option}" for option in settings.worker]
    settings.budget = [f"--{option}" for option in settings.budget]
    settings.room = 1024
    return settings


def main(arguments=None):
    settings = parse(arguments)
    try:
        bench = Bench(settings)
        for tokens in settings.tokens:
            bench.run(tokens)
    except (OSError, ProcessError) as error:
        say(f"decode_bench: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
