"""Make the tiny models and every golden file with Hugging Face transformers (see README.md for the format).

    python3 make_goldens.py                 all of them
    python3 make_goldens.py phi3-b tiny     only these

Needs torch, transformers, safetensors and numpy; a CPU is enough.  Weights are upcast to float32, attention is
the eager implementation.
"""
import json
import math
import os
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "training"))
from tasks import Gen, KEY0, S, VAL1  # noqa: E402

NEW_TOKENS = 64
TINY_NEW_TOKENS = 16

# Prompt length of each case of the two trained models, and the rotary regime it stays in.
TRAINED_CASES = {
    "llama-a": {"n1": (1, "default"), "n17": (17, "default"), "n300": (300, "default"), "n1500": (1500, "default"),
                "n4500": (4500, "default")},
    "phi3-b": {"n1": (1, "longrope-short"), "n17": (17, "longrope-short"), "n300": (300, "longrope-short"),
               "n1500": (1500, "longrope-short"), "n4032": (4032, "longrope-short"), "n4500": (4500, "longrope-long"),
               "n5000": (5000, "longrope-long")},
}

# Configurations are written as published checkpoints write them: rope_theta and rope_scaling at the top level.
COMMON = {"vocab_size": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
          "attention_bias": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
          "num_hidden_layers": 2, "intermediate_size": 128}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
PHI3 = {**COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "resid_pdrop": 0.0, "embd_pdrop": 0.0}

# name: (configuration, stored dtype, {golden: (prompt length, rotary regime)})
TINY = {
    # frequency bands of Llama 3.1; head_dim is not hidden_size / heads; tied head; grouped queries
    "llama3-rope": (
        {**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "tie_word_embeddings": True, "max_position_embeddings": 1024, "rope_theta": 10000.0,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 128}},
        torch.bfloat16, {"golden": (150, "llama3")}),
    # no head_dim in the configuration, as many KV heads as heads, a head of its own, float32
    "llama-untied-mha": (
        {**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
         "tie_word_embeddings": False, "max_position_embeddings": 512, "rope_theta": 500000.0, "rope_scaling": None},
        torch.float32, {"golden": (100, "default")}),
    # as Phi-4-mini: three quarters of each head turn, LongRoPE with short factors that are not 1
    "phi3-partial-rotary": (
        {**PHI3, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
         "partial_rotary_factor": 0.75, "max_position_embeddings": 1024, "original_max_position_embeddings": 128,
         "rope_theta": 10000.0, "sliding_window": None,
         "rope_scaling": {"type": "longrope", "short_factor": [round(1 + .02 * i, 2) for i in range(12)],
                          "long_factor": [round(1 + .06 * i * i, 2) for i in range(12)]}},
        torch.bfloat16, {"golden-short": (100, "longrope-short"), "golden-long": (150, "longrope-long")}),
    # as the first Phi-3-mini: a sliding window, as many KV heads as heads, no rope scaling, a head of its own
    "phi3-sliding-window": (
        {**PHI3, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
         "max_position_embeddings": 512, "original_max_position_embeddings": 512, "rope_theta": 10000.0,
         "rope_scaling": None, "sliding_window": 48},
        torch.float16, {"golden": (150, "default")}),
}


def make_tiny(name):
    """Random weights: large enough for sharp attention and clear logits, norms that are not 1."""
    settings, dtype, _ = TINY[name]
    folder = os.path.join(HERE, "tiny", name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({**settings, "torch_dtype": str(dtype).removeprefix("torch.")}, f, indent=1)
        f.write("\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rng = torch.Generator().manual_seed(sum(name.encode()))
    weights = {}
    for key, p in model.named_parameters():
        if p.dim() == 1:
            w = 1 + .2 * torch.randn(p.shape, generator=rng)
        else:
            std = 0.3 if "embed" in key else 1.6 / math.sqrt(p.shape[1])
            w = std * torch.randn(p.shape, generator=rng)
        weights[key] = w.to(dtype).contiguous()
    if settings["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def trained_prompt(n):
    """Records, questions and background text with a run of symbols in it, and the beginning of that run again at the
    end: the model goes on copying, so every greedy token is retrieved from the prompt."""
    if n == 1:
        return [S["BOS"]]
    rng, length = np.random.default_rng(n), min(64, n - 7)
    run = [S["COPY"], *rng.integers(KEY0, VAL1, length).tolist()]
    rest = n - len(run) - 3
    text = Gen(600 + n).kv_prompt(rest, 64, 8, True, True)[0].tolist() if rest > 64 else [S["BOS"]] * rest
    return text[:1 + rest // 3] + run + text[1 + rest // 3:] + run[:3]


def tiny_prompt(n):
    return [1] + np.random.default_rng(n).integers(3, COMMON["vocab_size"], n - 1).tolist()


@torch.no_grad()
def run(model, prompt, new_tokens):
    """Logits of the prompt, then greedy tokens and gaps step by step through the cache."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logits, greedy, gap, last = out.logits[0], [], [], out.logits[0, -1]
    for _ in range(new_tokens):
        top = last.topk(2)
        greedy.append(int(top.indices[0]))
        gap.append(float(top.values[0] - top.values[1]))
        out = model(torch.tensor([[greedy[-1]]]), past_key_values=out.past_key_values, use_cache=True)
        last = out.logits[0, -1]
    return logits, greedy, gap


@torch.no_grad()
def check(model, prompt, logits, greedy, gap):
    """The cache must not change the answer: one pass over prompt and answer gives the same."""
    again = model(torch.tensor([prompt + greedy[:-1]]), use_cache=False).logits[0]
    error = float((again[:len(prompt)] - logits).abs().max())
    picked = again[len(prompt) - 1:].argmax(-1).tolist()
    for step, (a, b) in enumerate(zip(picked, greedy)):
        if a != b and gap[step] > 1e-3:
            raise RuntimeError(f"step {step}: {b} through the cache, {a} without")
    if error > 1e-2 * float(logits.std()):
        raise RuntimeError(f"logits differ by {error}")


def make_golden(folder, name, case, path, prompt, rope, new_tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    original = getattr(model.config, "original_max_position_embeddings", None)
    if rope == "longrope-short" and len(prompt) + new_tokens > original:
        raise ValueError(f"{name} {case}: crosses LongRoPE's switch")
    if rope == "longrope-long" and len(prompt) <= original:
        raise ValueError(f"{name} {case}: begins below LongRoPE's switch")
    logits, greedy, gap = run(model, prompt, new_tokens)
    check(model, prompt, logits, greedy, gap)
    tensors = {"prompt": torch.tensor(prompt, dtype=torch.int32), "logits_last": logits[-1].clone(),
               "greedy": torch.tensor(greedy, dtype=torch.int32), "gap": torch.tensor(gap, dtype=torch.float32)}
    if logits.numel() <= 40000:
        tensors["logits_all"] = logits.contiguous()
    if len(prompt) <= 320:
        top = logits.topk(5)
        tensors["top5_ids"] = top.indices.to(torch.int32).contiguous()
        tensors["top5_logits"] = top.values.contiguous()
    save_file(tensors, path, metadata={
        "model": name, "case": case, "rope": rope, "transformers": transformers.__version__,
        "torch": torch.__version__, "compute": "float32 eager", "prompt_tokens": str(len(prompt)),
        "new_tokens": str(new_tokens)})
    print(f"{name} {case}: {len(prompt)} tokens, logit std {float(logits[-1].std()):.3f}, "
          f"smallest gap {min(gap):.4f}, distinct tokens {len(set(greedy))}", flush=True)


def main():
    wanted = sys.argv[1:] or [*TRAINED_CASES, "tiny"]
    for name, cases in TRAINED_CASES.items():
        if name not in wanted:
            continue
        out = os.path.join(HERE, "goldens", name)
        os.makedirs(out, exist_ok=True)
        for case, (n, rope) in cases.items():
            make_golden(os.path.join(HERE, name), name, case, os.path.join(out, case + ".safetensors"),
                        trained_prompt(n), rope, NEW_TOKENS)
    if "tiny" in wanted:
        for name, (_, _, cases) in TINY.items():
            make_tiny(name)
            folder = os.path.join(HERE, "tiny", name)
            for case, (n, rope) in cases.items():
                make_golden(folder, name, case, os.path.join(folder, case + ".safetensors"), tiny_prompt(n), rope,
                            TINY_NEW_TOKENS)


if __name__ == "__main__":
    main()
