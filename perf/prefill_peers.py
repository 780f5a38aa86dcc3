#!/usr/bin/env python3
"""How fast PyTorch's attention is on prefill_bench's shapes, and cuda_device_check's *Timing*: peers.

Scaled dot product attention of a prefill, causal, of one layer, whose KV heads are repeated for it,
by cuDNN and by flash attention. Prints a median and the rate of causal work, a line each; with
--json as JSON lines, which prefill_bench --peers puts beside its own. Needs PyTorch and a CUDA card.

    perf/prefill_peers.py --shape llama-3-8b --tokens 8192 32768 131072 --json > peers.jsonl
"""
import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Query heads, KV heads, head_dim.
SHAPES = {"llama-3-8b": (32, 8, 128), "phi-3-mini": (32, 32, 96), "heads-of-64": (32, 8, 64)}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MOST_S = 10  # of a measurement, with fewer calls


def timed(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def seconds(call, least_s):
    """The median of as many calls as take about so long, at least three unless they take long."""
    for _ in range(2):
        if timed(call) > 1:
            break
    times = []
    while sum(times) < least_s or (len(times) < 3 and sum(times) < MOST_S):
        times.append(timed(call))
    return statistics.median(times)


def measure(shape, tokens, args):
    """A line's fields for each backend."""
    heads, kv_heads, head_dim = SHAPES[shape]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float16
    q = torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, kv_heads, tokens, head_dim, device="cuda", dtype=dtype)
            .repeat_interleave(heads // kv_heads, dim=1) for _ in range(2))
    for name in args.backends:
        with sdpa_kernel(BACKENDS[name]):
            took = seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
                           args.seconds)
        rate = 4 * head_dim * heads * tokens * (tokens + 1) / 2 / took * 1e-12
        yield {"backend": name, "shape": shape, "heads": heads, "kv_heads": kv_heads,
               "head_dim": head_dim, "dtype": args.dtype, "tokens": tokens, "seconds": took,
               "tflops": rate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=0.25, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for tokens in args.tokens:
        for shape in args.shape:
            for line in measure(shape, tokens, args):
                if args.json:
                    print(json.dumps(line), flush=True)
                else:
                    print(f"{line['backend']}, {tokens:7} tokens, {shape}: "
                          f"{line['seconds'] * 1e3:9.2f} ms, {line['tflops']:5.1f} TFLOP/s",
                          flush=True)


if __name__ == "__main__":
    main()
