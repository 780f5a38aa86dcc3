"""Models of the shape of well-known ones, with random weights: what they take and how fast they are does
not depend on what they say."""
import array
import json
import math
import os
import random
import struct

# config.json of each, but for what all have.
SHAPES = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "phi-3-mini": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    "tiny": {  # for tests
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}
BLOCK = 1 << 20  # random elements that all matrices are cut from
FILE_BYTES = 4 << 30


def config_of(shape, layers, max_tokens):
    config = {**SHAPES[shape], "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
              "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
              "max_position_embeddings": max_tokens}
    if layers:
        config["num_hidden_layers"] = layers
    return config


def head_dim_of(config):
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def matrices_of(config):
    """(name, rows, width) of every matrix, and (name, None, width) of every norm."""
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], head_dim_of(config)
    kv, inner = config["num_key_value_heads"] * head_dim, config["intermediate_size"]
    yield "model.embed_tokens.weight", config["vocab_size"], hidden
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", None, hidden
        yield at + "post_attention_layernorm.weight", None, hidden
        if config["model_type"] == "phi3":
            yield at + "self_attn.qkv_proj.weight", heads * head_dim + 2 * kv, hidden
            yield at + "mlp.gate_up_proj.weight", 2 * inner, hidden
        else:
            yield at + "self_attn.q_proj.weight", heads * head_dim, hidden
            yield at + "self_attn.k_proj.weight", kv, hidden
            yield at + "self_attn.v_proj.weight", kv, hidden
            yield at + "mlp.gate_proj.weight", inner, hidden
            yield at + "mlp.up_proj.weight", inner, hidden
        yield at + "self_attn.o_proj.weight", hidden, heads * head_dim
        yield at + "mlp.down_proj.weight", hidden, inner
    yield "model.norm.weight", None, hidden
    yield "lm_head.weight", config["vocab_size"], hidden


def bf16(values):
    """The upper halves of their fp32: rounded to zero."""
    wide = array.array("f", values).tobytes()
    out = bytearray(len(wide) // 2)
    out[0::2], out[1::2] = wide[2::4], wide[3::4]
    return bytes(out)


def write_model(directory, shape, layers, max_tokens, seed):
    """A Hugging Face folder; elements of matrices are normal, with a deviation of 1 / sqrt(width)."""
    os.makedirs(directory, exist_ok=True)
    config = config_of(shape, layers, max_tokens)
    draw = random.Random(seed)
    normal = [draw.gauss(0, 1) for _ in range(BLOCK)]
    blocks = {}  # by width
    weight_map, files, waiting = {}, 0, []
    for name, rows, width in [*matrices_of(config), (None, 0, 0)]:
        if waiting and (name is None or sum(count for _, _, count in waiting) * 2 > FILE_BYTES):
            file = f"model-{files:05d}.safetensors"
            _write_file(os.path.join(directory, file), waiting, blocks, draw)
            weight_map.update((tensor, file) for tensor, _, _ in waiting)
            files, waiting = files + 1, []
        if name is None:
            break
        if rows is not None and width not in blocks:
            blocks[width] = bf16([x / math.sqrt(width) for x in normal])
        waiting.append((name, [rows, width] if rows is not None else [width], (rows or 1) * width))
    with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"weight_map": weight_map}, file)
    # Last: a folder with it is whole.
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)


def _write_file(path, tensors, blocks, draw):
    header, at = {}, 0
    for name, shape, count in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * count]}
        at += 2 * count
    text = json.dumps(header).encode()
    one = bf16([1.0])
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, count in tensors:
            if len(shape) == 1:
                file.write(one * count)
                continue
            while count > 0:
                start = draw.randrange(BLOCK // 2)
                piece = min(count, BLOCK // 2)
                file.write(blocks[shape[-1]][2 * start:2 * (start + piece)])
                count -= piece
