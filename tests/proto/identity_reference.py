#!/usr/bin/env python3
"""Recomputes the identity digests of proto/IDENTITY.md with hashlib alone.

It shares nothing with proto/identity.cc but the document, so the two check each other.

  identity_reference.py golden_identity.json           exits 1 if a vector differs
  identity_reference.py --write golden_identity.json   writes the vectors anew
"""

import argparse
import hashlib
import json
import struct
import sys

BLOCK_TOKENS = 256
DTYPES = {"bf16": 1, "fp16": 2, "fp32": 3}
REGIMES = {"none": 0, "short": 1, "long": 2}
BUDGET_KINDS = {"unlimited": 0, "fixed_k": 1, "top_p": 2, "error": 3, "dipr": 4, "softmax_lift": 5}
ZERO = bytes(32)


def u32(x):
    return struct.pack("<I", x)


def u64(x):
    return struct.pack("<Q", x)


def f32(x):
    return struct.pack("<f", x)


def sized(data):
    return u64(len(data)) + data


def digests(values):
    return u64(len(values)) + b"".join(sized(v) for v in values)


def encode_rope(v):
    return (
        sized(b"quarry.rope.v1")
        + u64(len(v["inv_freq"]))
        + b"".join(f32(f) for f in v["inv_freq"])
        + f32(v["attention_scale"])
        + u32(v["rotary_dim"])
        + u32(1 if v["interleaved"] else 0)
        + u32(DTYPES[v["dtype"]])
        + u32(REGIMES[v["regime"]])
    )


def encode_namespace(v):
    return (
        sized(b"quarry.namespace.v1")
        + sized(v["tenant"].encode())
        + sized(bytes.fromhex(v["weights"]))
        + sized(bytes.fromhex(v["tokenizer"]))
        + digests([bytes.fromhex(a) for a in v["adapters"]])
        + sized(bytes.fromhex(v["rope"]))
        + sized(bytes.fromhex(v["recipe"]))
    )


def tokens_of(v):
    """Token i is first + i * step, modulo 2^32."""
    return [(v["first_token"] + i * v["token_step"]) % 2**32 for i in range(BLOCK_TOKENS)]


def encode_block(v):
    return (
        sized(b"quarry.block.v1")
        + sized(bytes.fromhex(v["parent"]))
        + sized(bytes.fromhex(v["namespace"]))
        + u64(BLOCK_TOKENS)
        + b"".join(u32(t) for t in tokens_of(v))
        + digests([bytes.fromhex(d) for d in v["inputs"]])
    )


def encode_engine_block(v):
    return (
        sized(b"quarry.engine_block.v1")
        + sized(v["tenant"].encode())
        + sized(v["engine_namespace"].encode())
        + sized(bytes.fromhex(v["key"]))
    )


def encode_recipe(v):
    """None for the dense recipe, which is 32 zero bytes and no hash."""
    if v["kind"] == "unlimited":
        return None
    amounts = {"top_p": "mass", "error": "error", "dipr": "beta"}
    amount = v[amounts[v["kind"]]] if v["kind"] in amounts else 0.0
    encoded = (
        sized(b"quarry.recipe.budget.v1")
        + u32(BUDGET_KINDS[v["kind"]])
        + u32(v["k"])
        + f32(amount)
        + u32(v["window_first"])
        + u32(v["window_last"])
    )
    return encoded + u32(v["seed"]) if v["kind"] == "softmax_lift" else encoded


def encode_stretch(v):
    return (
        sized(b"quarry.stretch.v1")
        + sized(bytes.fromhex(v["namespace"]))
        + u64(BLOCK_TOKENS)
        + b"".join(u32(t) for t in tokens_of(v))
        + digests([bytes.fromhex(d) for d in v["inputs"]])
    )


def encode_placed(v):
    return (
        sized(b"quarry.placed.v1")
        + sized(bytes.fromhex(v["parent"]))
        + sized(bytes.fromhex(v["stored"]))
        + u32(v["shift"] % 2**32)
    )


def encode_index_namespace(v):
    return sized(b"quarry.index_namespace.v1") + sized(bytes.fromhex(v["namespace"]))


def encode_run_index(v):
    return (
        sized(b"quarry.run_index.v1")
        + sized(v["tenant"].encode())
        + sized(v["full_key"].encode())
    )


def encode_shifted_recipe(v):
    return sized(b"quarry.recipe.shifted.v1") + sized(bytes.fromhex(v["recipe"]))


ENCODERS = {
    "rope": encode_rope,
    "namespace": encode_namespace,
    "block": encode_block,
    "engine_block": encode_engine_block,
    "recipe": encode_recipe,
    "stretch": encode_stretch,
    "placed": encode_placed,
    "index_namespace": encode_index_namespace,
    "run_index": encode_run_index,
    "shifted_recipe": encode_shifted_recipe,
}


def digest_of(kind, vector):
    encoded = ENCODERS[kind](vector)
    if encoded is None:
        return ZERO
    digest = hashlib.sha256(encoded).digest()
    return b"QRYINDEX" + digest[8:] if kind == "index_namespace" else digest


def inputs():
    """The vectors without their digests; later ones use earlier digests."""

    def fill(byte):
        return bytes([byte] * 32).hex()

    counting = bytes(range(32)).hex()
    plain = {
        "inv_freq": [1.0, 0.5, 0.25, 0.125],
        "attention_scale": 1.0,
        "rotary_dim": 8,
        "interleaved": False,
        "dtype": "fp32",
        "regime": "none",
    }
    scaled = dict(plain, attention_scale=1.1875, interleaved=True, dtype="bf16", regime="long")
    no_rope = dict(plain, inv_freq=[], rotary_dim=0)
    example = {
        "tenant": "acme",
        "weights": fill(0x11),
        "tokenizer": fill(0x22),
        "adapters": [],
        "rope": digest_of("rope", plain).hex(),
        "recipe": ZERO.hex(),
    }
    budgeted = {"kind": "fixed_k", "k": 1024, "mass": 1.0, "window_first": 4, "window_last": 512}
    adapted = dict(
        example,
        tenant="m\u00fcller",
        adapters=[fill(0x33), counting],
        recipe=digest_of("recipe", budgeted).hex(),
    )
    name_space = digest_of("namespace", example).hex()
    first = {
        "parent": ZERO.hex(),
        "namespace": name_space,
        "first_token": 1000,
        "token_step": 1,
        "inputs": [],
    }
    second = dict(first, parent=digest_of("block", first).hex(), first_token=1256)
    seen = dict(first, first_token=4294967295, token_step=77777, inputs=[counting, fill(0x44)])
    key = {"tenant": "acme", "engine_namespace": "vllm", "key": b"layer-0/block-7".hex()}
    return {
        "rope": {"plain": plain, "scaled": scaled, "none": no_rope},
        "namespace": {"example": example, "adapted": adapted},
        "block": {"first": first, "second": second, "with_inputs": seen},
        "engine_block": {
            "text_key": key,
            "binary_key": dict(key, engine_namespace="", key=bytes(range(256)).hex()),
        },
        "recipe": {
            "dense": dict(budgeted, kind="unlimited"),
            "fixed_k": budgeted,
            "top_p": {"kind": "top_p", "k": 0, "mass": 0.9375, "window_first": 0, "window_last": 64},
            "error": dict(budgeted, kind="error", k=0, error=0.03125),
            "dipr": dict(budgeted, kind="dipr", beta=6.5),
            "softmax_lift": dict(budgeted, kind="softmax_lift", seed=77),
        },
        "stretch": {
            name: {key: v[key] for key in ("namespace", "first_token", "token_step", "inputs")}
            for name, v in (("second", second), ("with_inputs", seen))
        },
        "placed": {
            "later": {
                "parent": digest_of("block", first).hex(),
                "stored": digest_of("block", second).hex(),
                "shift": 1024,
            },
            "earlier": {
                "parent": ZERO.hex(),
                "stored": digest_of("block", second).hex(),
                "shift": -256,
            },
        },
        "index_namespace": {"example": {"namespace": fill(0x55)}},
        "run_index": {"example": {"tenant": "acme", "full_key": "run-index:00:128:8320"}},
        "shifted_recipe": {
            "dense": {"recipe": ZERO.hex()},
            "fixed_k": {"recipe": digest_of("recipe", budgeted).hex()},
        },
    }


def write(path):
    golden = inputs()
    for kind, vectors in golden.items():
        for vector in vectors.values():
            encoded = ENCODERS[kind](vector)
            # Shown where it is short enough to be compared by eye.
            if encoded is not None and len(encoded) <= 512:
                vector["encoded"] = encoded.hex()
            vector["digest"] = digest_of(kind, vector).hex()
    with open(path, "w", encoding="utf-8") as f:
        json.dump(golden, f, indent=1)
        f.write("\n")


def check(path):
    with open(path, encoding="utf-8") as f:
        golden = json.load(f)
    checked = wrong = 0
    for kind, vectors in golden.items():
        for name, vector in vectors.items():
            checked += 1
            got = digest_of(kind, vector).hex()
            if got != vector["digest"]:
                wrong += 1
                print(f"{kind} {name}: computed {got}, the file has {vector['digest']}")
            encoded = ENCODERS[kind](vector)
            if "encoded" in vector and encoded.hex() != vector["encoded"]:
                wrong += 1
                print(f"{kind} {name}: the encoding differs from the file's")
    missing = {k: sorted(set(v) - set(golden.get(k, {}))) for k, v in inputs().items()}
    for kind, names in missing.items():
        for name in names:
            wrong += 1
            print(f"{kind} {name}: not in the file")
    print(f"{checked} vectors checked, {wrong} wrong")
    return 1 if wrong or not checked else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file instead of checking it")
    parser.add_argument("path")
    args = parser.parse_args()
    if args.write:
        write(args.path)
        return 0
    return check(args.path)


if __name__ == "__main__":
    sys.exit(main())
