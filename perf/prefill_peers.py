#!/usr/bin/env python3
"""How fast PyTorch's attention is on the shapes of cuda_device_check's *Timing*: its peers.

Scaled dot product attention of a prefill, causal, bf16, 32 query heads, whose KV heads are repeated
for it, by cuDNN and by flash attention. Prints a median and the rate of causal work, a line each;
with --json as JSON lines. Needs PyTorch and a CUDA card.

    perf/prefill_peers.py --head-dims 128 --tokens 8192 32768 131072
"""
import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS = 32
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def seconds(call, least_s):
    """The median of as many calls as take about so long, at least three."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    times = []
    while len(times) < 3 or sum(times) < least_s:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=0.25, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for tokens in args.tokens:
        for head_dim in args.head_dims:
            q, k, v = (torch.randn(1, HEADS, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
                       for _ in range(3))
            for name in args.backends:
                with sdpa_kernel(BACKENDS[name]):
                    took = seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
                                   args.seconds)
                rate = 4 * head_dim * HEADS * tokens * (tokens + 1) / 2 / took * 1e-12
                if args.json:
                    print(json.dumps({"backend": name, "tokens": tokens, "head_dim": head_dim,
                                      "seconds": took, "tflops": rate}), flush=True)
                else:
                    print(f"{name}, {tokens:6} tokens, heads of {head_dim:3}: {took * 1e3:8.2f} ms, "
                          f"{rate:5.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
