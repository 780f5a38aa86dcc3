#!/usr/bin/python3
"""Makes traces of the reference models at work, for `retrieval_bench --traces`.

For every model, task and length a sequence of the models' own task generator is run by quarry-worker
with full attention: all but its last tokens as a prompt, the last ones token by token, whatever the
model would have said. Each layer becomes MODEL-TASK-TOKENS-layer-NN.safetensors. What is in the
directory already is left alone, so an interrupted run can go on.

Needs numpy (Debian: python3-numpy) beside the built worker. Prefill takes time quadratic in the
length: see perf/README.md for what the whole set costs.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = os.path.join(ROOT, "tests", "models")
TASKS = ("kv1", "kv2", "ps", "vt", "hop", "icl", "mf", "copy")
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
LEAST_TOKENS = 256  # that every task fits into
MOST_SEED = 2**32 - 1
CANDIDATES = 8  # sequences drawn, of which the one with the most answers at its end is taken


def fail(text):
    print(f"make_traces: {text}", file=sys.stderr)
    sys.exit(2)


def task_sequence(task, tokens, decoded, seed):
    """Token ids of one task, with questions and answers among the last `decoded` of them."""
    sys.path.insert(0, os.path.join(MODELS, "training"))
    from tasks import Gen  # pylint: disable=import-outside-toplevel
    generator = Gen([seed, tokens, TASKS.index(task)])
    if task in ("kv1", "kv2"):
        records = min(1024, tokens // 16)
        ids, _, _ = generator.kv_prompt(tokens, records, 64, two=task == "kv2", even=True)
        return ids.tolist()
    drawn = [generator.sequence(tokens, {task: 1.0}) for _ in range(CANDIDATES)]
    ids, _, _ = max(drawn, key=lambda d: int((d[1][-decoded:] == 1).sum()))
    return ids.tolist()


def trace_name(model, task, tokens, layer):
    return f"{model}-{task}-{tokens}-layer-{layer:02d}.safetensors"


def layer_count(model_directory):
    with open(os.path.join(model_directory, "config.json"), encoding="utf-8") as file:
        return json.load(file)["num_hidden_layers"]


def layers_of(model_directory, wanted):
    return [layer for layer in range(layer_count(model_directory)) if not wanted or layer in wanted]


def write_ids(directory, name, ids):
    path = os.path.join(directory, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(",".join(map(str, ids)))
    return "@" + path


def run_worker(worker, model_directory, ids, settings, directory):
    """Dumps the layers of one run into `directory`."""
    prompt, decoded = ids[:-settings.decoded], ids[-settings.decoded:]
    subprocess.run(
        [worker, "--model", model_directory, "--device", settings.device, "--attention", "full",
         "--ignore-eos", "--json",
         "--prompt-ids", write_ids(directory, "prompt", prompt),
         "--gold-ids", write_ids(directory, "gold", decoded), "--dump-kv", directory,
         "--dump-queries", str(settings.queries), "--dump-seed", str(settings.seed),
         "--dump-layers", ",".join(map(str, layers_of(model_directory, settings.layers)))],
        check=True, stdout=subprocess.DEVNULL)


def make(settings, model, task, tokens, sequence=task_sequence):
    """The traces of one run; returns how many were written, none if all are there."""
    model_directory = os.path.join(MODELS, model)
    layers = layers_of(model_directory, settings.layers)
    names = {layer: trace_name(model, task, tokens, layer) for layer in layers}
    missing = [layer for layer, name in names.items()
               if not os.path.exists(os.path.join(settings.directory, name))]
    if not missing:
        return 0
    worker = os.path.join(settings.build, "gpu", "quarry-worker")
    with tempfile.TemporaryDirectory(prefix=".run-", dir=settings.directory) as run:
        run_worker(worker, model_directory, sequence(task, tokens, settings.decoded, settings.seed),
                   settings, run)
        for layer in missing:
            os.replace(os.path.join(run, f"layer-{layer:02d}.safetensors"),
                       os.path.join(settings.directory, names[layer]))
    return len(missing)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="for the traces; is made")
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--device", default="host", help="of the worker: host, cuda or cuda:N")
    parser.add_argument("--models", nargs="+", default=["llama-a", "phi3-b"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="with the decoded")
    parser.add_argument("--layers", nargs="+", type=int, help="only these")
    parser.add_argument("--decoded", type=int, default=64, help="tokens behind the prompt")
    parser.add_argument("--queries", type=int, default=2048, help="sampled from the prompt")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def check_numbers(settings):
    if settings.decoded < 1:
        fail(f"--decoded {settings.decoded}: at least 1 token is decoded")
    if settings.queries < 0:
        fail(f"--queries {settings.queries}: no fewer than 0 are sampled")
    if not 0 <= settings.seed <= MOST_SEED:
        fail(f"--seed {settings.seed}: not from 0 to {MOST_SEED}")
    for tokens in settings.tokens:
        if tokens < LEAST_TOKENS:
            fail(f"--tokens {tokens}: tasks need at least {LEAST_TOKENS}")
        if tokens <= settings.decoded:
            fail(f"--decoded {settings.decoded} leave no prompt of --tokens {tokens}")


def check(settings):
    """Everything that the first run would fail for."""
    check_numbers(settings)
    worker = os.path.join(settings.build, "gpu", "quarry-worker")
    if not os.access(worker, os.X_OK):
        fail(f"there is no program {worker}: --build names the folder of the built ones")
    for model in settings.models:
        directory = os.path.join(MODELS, model)
        if not os.path.exists(os.path.join(directory, "config.json")):
            fail(f"there is no model {model} in {MODELS}")
        count = layer_count(directory)
        for layer in settings.layers or []:
            if not 0 <= layer < count:
                fail(f"--layers {layer}: {model} has layers 0 to {count - 1}")
    if importlib.util.find_spec("numpy") is None:
        fail("numpy is needed (Debian: python3-numpy)")


def make_all(settings):
    os.makedirs(settings.directory, exist_ok=True)
    for tokens in sorted(settings.tokens):
        for model in settings.models:
            for task in settings.tasks:
                start = time.monotonic()
                written = make(settings, model, task, tokens)
                print(f"{model} {task} {tokens}: {written} traces in "
                      f"{time.monotonic() - start:.0f} s", flush=True)


def main(arguments=None):
    settings = parse(arguments)
    check(settings)
    try:
        make_all(settings)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except subprocess.CalledProcessError as error:
        fail(f"{error.cmd[0]} ended with status {error.returncode}")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
