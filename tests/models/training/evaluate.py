"""Measure an exported model and write metrics.json into its folder.

    python3 evaluate.py llama-a ../llama-a --seconds 200
    python3 evaluate.py llama-a ../llama-a --show           print what metrics.json says

Key-value questions at the end of long prompts come first, then every task, then where attention goes.  What does
not fit in the time is listed in metrics.json.  Works without a GPU, slowly.
"""
import argparse
import json
import os
import time

import numpy as np
import torch

import tasks
from model import MODELS, load_export, write_json

TASKS = ("kv1", "kv2", "ps", "vt", "hop", "icl", "mf", "copy")


def verify_hf(m, folder, device):
    """Compare logits with transformers in float32, on both sides of LongRoPE's switch."""
    try:
        import transformers
    except ImportError:
        return {"checked": False, "why": "transformers is not installed"}
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    net, result = load_export(m, folder, device), {"checked": True, "transformers": transformers.__version__}
    gen = tasks.Gen(77)
    for length in (512, 6000):
        tok = torch.from_numpy(gen.batch(1, length, tasks.MIXES["full"])[0].astype(np.int64)).to(device)
        with torch.no_grad():
            ours, theirs = net(tok).float(), hf(tok).logits.float()
        result[f"T{length}"] = {"largest_difference": float((ours - theirs).abs().max()),
                                "logit_std": float(theirs.std()),
                                "same_argmax": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())}
    return result


class Evaluation:
    def __init__(self, name, folder, seconds, device):
        self.m, self.device, self.folder = MODELS[name], device, folder
        self.net = load_export(self.m, folder, device)
        self.net.amp = True
        self.end = time.time() + seconds
        self.metrics = {"model": name, "weights": "exported bfloat16 weights, bfloat16 activations",
                        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                        "torch": torch.__version__, "kv_at_end": {}, "tasks": {}, "attention": {},
                        "not_measured_out_of_time": []}

    @torch.no_grad()
    def answers(self, tok, at, length=0):
        """The model's choice for the token after each position in `at`."""
        with torch.autocast(self.device, dtype=torch.bfloat16):
            out = self.net(torch.from_numpy(tok.astype(np.int64))[None].to(self.device), None,
                           torch.from_numpy(at).to(self.device), length)
        return out.argmax(-1).cpu().numpy()

    def kv_at_end(self, length, records, two, prompts, pinned_long=False, questions=64):
        """Records spread evenly over the prompt, questions at its end; an answer counts when both tokens are right."""
        gen, depth = tasks.Gen(500 + length + records), np.zeros((8, 2), int)
        for _ in range(prompts):
            tok, ask, record = gen.kv_prompt(length, records, questions, two, True)
            at = np.stack([ask, ask + 1], 1).reshape(-1)
            right = self.answers(tok, at, self.m["maxpos"] if pinned_long else 0) == tok[at + 1]
            eighth = np.minimum(7, 8 * record // length)
            np.add.at(depth, (eighth, 0), right.reshape(-1, 2).all(1))
            np.add.at(depth, (eighth, 1), 1)
        right, asked = depth.sum(0).tolist()
        name = f"{'kv2' if two else 'kv1'}_{records}_records" + ("_long_factors" if pinned_long else "")
        self.metrics["kv_at_end"].setdefault(str(length), {})[name] = {
            "exact": round(right / asked, 4), "right": right, "asked": asked, "prompts": prompts,
            "right_and_asked_by_eighth": depth.tolist()}

    def task(self, length, task, sequences):
        """Token accuracy on sequences of one task, as in training."""
        gen, row = tasks.Gen(9000 + length), self.metrics["tasks"].setdefault(str(length), {})
        wanted = {task: np.zeros(2, int)}
        if task == "kv1":
            wanted["filler"] = np.zeros(2, int)
        for _ in range(sequences):
            tok, weight, tag, _ = gen.batch(1, length, {task: 1.})
            at = np.flatnonzero(weight[0, 1:])
            right, kind = self.answers(tok[0], at) == tok[0, 1:][at], tag[0, 1:][at]
            for name, count in wanted.items():
                chosen = kind == tasks.TID[name]
                count += (int(right[chosen].sum()), int(chosen.sum()))
        for name, (right, asked) in wanted.items():
            if asked:
                row[name] = {"token_accuracy": round(float(right / asked), 4), "tokens": int(asked), "sequences": sequences}

    @torch.no_grad()
    def attention(self, length, records, prompts=2, questions=16):
        """Where the heads look when they predict an answer's first token, and how far queries lie from keys."""
        m, gen, device = self.m, tasks.Gen(4242), self.device
        group, scale = m["heads"] // m["kv"], m["dim"] ** -.5
        shape = (m["layers"], m["heads"])
        needed, mass, distance = np.zeros(shape), np.zeros(shape), {}
        for prompt in range(prompts):
            tok, ask, record = gen.kv_prompt(length, records, questions, True, True)
            for b in self.net.blocks:
                b.keep = []
            self.answers(tok, ask)
            ask, record = torch.from_numpy(ask).to(device), torch.from_numpy(record).to(device)
            later = torch.arange(len(tok), device=device)[None] > ask[:, None]
            for layer, b in enumerate(self.net.blocks):
                q, k = (x[0].float() for x in b.keep[0])
                b.keep = None
                for h in range(m["heads"]):
                    p = (q[h][ask] @ k[h // group].T * scale).masked_fill(later, -1e30).softmax(-1)
                    sums = p.sort(-1, descending=True)[0].cumsum(-1)
                    needed[layer, h] += ((sums < .9).sum(-1) + 1).float().median().item() / prompts
                    at = record[:, None] + torch.arange(6, device=device)
                    mass[layer, h] += p.gather(1, at).sum(1).mean().item() / prompts
                if prompt == 0:
                    for kv in range(m["kv"]):
                        heads = q[kv * group:(kv + 1) * group].reshape(-1, m["dim"])
                        distance[f"layer{layer}_kv{kv}"] = self.off_keys(k[kv], heads)
        strong = [[layer, h] for layer in range(m["layers"]) for h in range(m["heads"]) if mass[layer, h] >= .5]
        self.metrics["attention"][str(length)] = {
            "records": records, "prompts": prompts, "questions": questions * prompts,
            "tokens_for_90_percent_mass": np.round(needed, 1).tolist(),
            "mass_on_the_record": np.round(mass, 4).tolist(), "heads_with_half_their_mass_on_the_record": strong,
            "median_mahalanobis_distance_to_keys": distance}

    def off_keys(self, keys, queries):
        """Median Mahalanobis distance of unseen keys and of queries to the distribution of the keys."""
        rng = torch.Generator().manual_seed(0)
        order = torch.randperm(len(keys), generator=rng).to(keys.device)
        fit, unseen = keys[order[:len(keys) // 2]].double(), keys[order[len(keys) // 2:][:2000]].double()
        queries = queries[torch.randperm(len(queries), generator=rng)[:2000].to(keys.device)].double()
        mean = fit.mean(0)
        cov = (fit - mean).T @ (fit - mean) / len(fit)
        cov += torch.eye(len(cov), device=keys.device, dtype=cov.dtype) * cov.diagonal().mean() * 1e-3
        inverse = torch.linalg.inv(cov)

        def median(x):
            return round((((x - mean) @ inverse) * (x - mean)).sum(-1).sqrt().median().item(), 2)
        return {"keys": median(unseen), "queries": median(queries)}

    def plan(self):
        """(what, function) in order of importance."""
        gpu, steps = self.device == "cuda", []
        for length in (16384, 4096, 32768, 131072, 1024, 65536):
            prompts = max(1, min(16, (1 << 19) // length)) if gpu else max(1, 4096 // length)
            for records in (64, 256, 1024):
                for two in (True, False):
                    if records * 6 < length * .7 and (gpu or records == 64):
                        steps.append((f"kv {length} {records} {two}",
                                      lambda a=(length, records, two, prompts): self.kv_at_end(*a)))
            if self.m["arch"] == "phi3" and length <= self.m["origpos"]:
                steps.append((f"kv {length} long factors",
                              lambda a=(length, 64, True, prompts): self.kv_at_end(*a, pinned_long=True)))
        for length in (4096, 1024, 32768, 256, 131072) if gpu else (1024, 256):
            for task in TASKS:
                count = max(1, min(64, (1 << 18) // length)) if gpu else 8
                steps.append((f"task {task} {length}", lambda a=(length, task, count): self.task(*a)))
        for length in (1024, 4096, 32768) if gpu else (1024,):
            steps.append((f"attention {length}", lambda a=(length, min(256, length // 24)): self.attention(*a)))
        return steps

    def run(self):
        start = time.time()
        for what, step in self.plan():
            if time.time() > self.end:
                self.metrics["not_measured_out_of_time"].append(what)
                continue
            step()
            write_json(self.folder, "metrics.json", self.metrics)
        self.metrics["hf_check"] = verify_hf(self.m, self.folder, self.device)
        self.metrics["evaluation_seconds"] = round(time.time() - start, 1)
        write_json(self.folder, "metrics.json", self.metrics)


def show(metrics):
    print("whole key-value answers, questions at the end of the prompt")
    for length, row in sorted(metrics["kv_at_end"].items(), key=lambda item: int(item[0])):
        print(f"  {length}:", ", ".join(f"{name} {v['right']}/{v['asked']}" for name, v in row.items()))
    print("token accuracy of each task")
    for length, row in sorted(metrics["tasks"].items(), key=lambda item: int(item[0])):
        print(f"  {length}:", ", ".join(f"{name} {v['token_accuracy']:.4f}" for name, v in row.items()))
    print("transformers:", metrics["hf_check"])
    print("not measured:", metrics["not_measured_out_of_time"], flush=True)


def evaluate(name, folder, seconds, device):
    evaluation = Evaluation(name, folder, seconds, device)
    evaluation.run()
    show(evaluation.metrics)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=list(MODELS))
    ap.add_argument("folder")
    ap.add_argument("--seconds", type=float, default=200)
    ap.add_argument("--show", action="store_true")
    args = ap.parse_args()
    if args.show:
        with open(os.path.join(args.folder, "metrics.json")) as f:
            show(json.load(f))
        return
    evaluate(args.model, args.folder, args.seconds, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
