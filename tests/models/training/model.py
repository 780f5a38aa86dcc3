"""The two architectures as one module, and their Hugging Face folders.

Llama and Phi-3 with LongRoPE differ in rotary tables and in how matrices are stored: Phi-3 fuses the query, key
and value matrices, and gate and up; here they are separate and fused on export.
"""
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import tasks

MODELS = {
    "llama-a": {"arch": "llama", "hidden": 384, "layers": 5, "heads": 6, "kv": 2, "dim": 128, "inter": 768,
                "theta": 5e6, "maxpos": 131072},
    "phi3-b": {"arch": "phi3", "hidden": 384, "layers": 6, "heads": 4, "kv": 2, "dim": 96, "inter": 768,
               "theta": 1e4, "maxpos": 131072, "origpos": 4096},
    # for trying the program out
    "tiny": {"arch": "phi3", "hidden": 128, "layers": 2, "heads": 4, "kv": 2, "dim": 32, "inter": 96,
             "theta": 1e4, "maxpos": 4096, "origpos": 128},
}
SHARD_BYTES = 12 << 20


# ---- rotary positions ---------------------------------------------------------------------
def long_factors(m):
    """LongRoPE factors: 1 for fast pairs, rising to max/original for slow ones (YaRN's ramp)."""
    half, stretch = m["dim"] // 2, m["maxpos"] / m["origpos"]
    inv = m["theta"] ** (-np.arange(half) / half)
    turns = m["origpos"] * inv / (2 * math.pi)             # turns within the original length
    ramp = np.clip((turns - 1) / (32 - 1), 0, 1)           # 1: keep, 0: stretch fully
    factors = 1 / (ramp + (1 - ramp) / stretch)
    return [round(float(x), 6) for x in np.maximum.accumulate(factors)]


def rope_tables(m, pos, length):
    """float32 cos and sin [.., T, 1, dim] for position numbers [.., T]; length picks short or long factors."""
    # rounded as transformers rounds it: at position 6000 one unit in the last place shows in the logits
    wave = m["theta"] ** (torch.arange(0, m["dim"], 2, dtype=torch.float32, device=pos.device) / m["dim"])
    scale = 1.0
    if m["arch"] == "phi3":
        if length > m["origpos"]:
            wave = wave * torch.tensor(long_factors(m), device=pos.device)
        scale = math.sqrt(1 + math.log(m["maxpos"] / m["origpos"]) / math.log(m["origpos"]))
    angle = pos.float()[..., None] * (1 / wave)
    angle = torch.cat([angle, angle], -1)[..., None, :]
    return angle.cos() * scale, angle.sin() * scale


def rotate(x, cos, sin):
    y, half = x.float(), x.shape[-1] // 2
    return (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin).to(x.dtype)


def swiglu(gate, up):
    return F.silu(gate) * up


# ---- the network --------------------------------------------------------------------------
class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-5)


class Block(nn.Module):
    rotate, swiglu = staticmethod(rotate), staticmethod(swiglu)

    def __init__(self, m):
        super().__init__()
        hidden, dim = m["hidden"], m["dim"]
        self.m = m
        self.n1, self.n2 = Norm(hidden), Norm(hidden)
        self.q = nn.Linear(hidden, m["heads"] * dim, bias=False)
        self.k = nn.Linear(hidden, m["kv"] * dim, bias=False)
        self.v = nn.Linear(hidden, m["kv"] * dim, bias=False)
        self.o = nn.Linear(m["heads"] * dim, hidden, bias=False)
        self.gate = nn.Linear(hidden, m["inter"], bias=False)
        self.up = nn.Linear(hidden, m["inter"], bias=False)
        self.down = nn.Linear(m["inter"], hidden, bias=False)
        self.keep = None                     # set to a list to record queries and keys

    def forward(self, x, cos, sin):
        m, (batch, T, _) = self.m, x.shape
        y = self.n1(x)
        q = self.rotate(self.q(y).view(batch, T, m["heads"], m["dim"]), cos, sin).transpose(1, 2)
        k = self.rotate(self.k(y).view(batch, T, m["kv"], m["dim"]), cos, sin).transpose(1, 2)
        v = self.v(y).view(batch, T, m["kv"], m["dim"]).transpose(1, 2)
        if self.keep is not None:
            self.keep.append((q.detach(), k.detach()))
        group = m["heads"] // m["kv"]
        a = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1),
                                           is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(batch, T, -1))
        y = self.n2(x)
        return x + self.down(self.swiglu(self.gate(y), self.up(y)))


class Net(nn.Module):
    def __init__(self, m, init="plain"):
        """init: plain (random weights), prev (layer 0's heads start looking a few tokens back) or circuit (layer 1's
        heads also start matching query and record)."""
        super().__init__()
        self.m = m
        self.amp = False                     # bfloat16 activations; under autocast only
        self.emb = nn.Embedding(tasks.VOCAB, m["hidden"])
        self.blocks = nn.ModuleList([Block(m) for _ in range(m["layers"])])
        self.norm = Norm(m["hidden"])
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = .02 if "emb" in name else p.shape[1] ** -.5 * .8
                if name.endswith(("o.weight", "down.weight")):
                    std /= math.sqrt(2 * m["layers"])
                nn.init.normal_(p, std=std)
        if init in ("prev", "circuit"):
            self._init_prev()
        if init == "circuit":
            self._init_circuit()

    def fuse(self):
        """Compile the pointwise parts; they cost more than the matrices at this size."""
        for b in self.blocks:
            b.rotate = torch.compile(rotate, dynamic=True)
            b.swiglu = torch.compile(swiglu, dynamic=True)

    def forward(self, tok, pos=None, at=None, length=0):
        """Logits at the flat positions `at` (all without it) of tok [batch, T]; pos [batch, T] are position
        numbers, 0..T-1 without it.  LongRoPE chooses its factors by the largest position, or by `length` where that
        is larger."""
        if pos is None:
            length = max(length, tok.shape[1])
            pos = torch.arange(tok.shape[1], device=tok.device)[None]
        else:
            length = max(length, int(pos.max()) + 1)
        x = self.emb(tok).to(torch.bfloat16 if self.amp else self.emb.weight.dtype)
        cos, sin = rope_tables(self.m, pos, length)
        for b in self.blocks:
            x = b(x, cos, sin)
        x = self.norm(x)
        if at is not None:
            x = x.reshape(-1, x.shape[-1])[at]
        return F.linear(x, self.emb.weight.to(x.dtype))

    # ---- structured starts: everything is trained from there ------------------------------
    def _tokens_back(self, head):
        """How far layer 0's head looks back in the structured starts: 1 to 4, over the heads."""
        group = self.m["heads"] // self.m["kv"]
        return 1 + (head // group + (head % group) * self.m["kv"]) % 4

    @torch.no_grad()
    def _init_prev(self):
        """Embedding column 0 is a constant; keys and queries of layer 0 are made from it, the queries turned back
        by j positions, so the score is highest j tokens back."""
        m, b = self.m, self.blocks[0]
        dim, half, hidden = m["dim"], m["dim"] // 2, m["hidden"]
        self.emb.weight[:, 0] = .02 * math.sqrt(hidden) * .5
        b.q.weight.mul_(.1)
        b.k.weight.mul_(.1)
        after_norm = .5 * math.sqrt(hidden) / math.sqrt(1.25)
        pairs = 10                                           # the fastest ones
        amp = math.sqrt(7 * math.sqrt(dim)) / after_norm / 1.2
        w = m["theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        for kv in range(m["kv"]):
            b.k.weight[kv * dim:kv * dim + pairs, 0] = amp
            b.k.weight[kv * dim + half:kv * dim + half + pairs, 0] = 0
        for h in range(m["heads"]):
            j = self._tokens_back(h)
            b.q.weight[h * dim:h * dim + pairs, 0] = amp * torch.cos(-j * w[:pairs])
            b.q.weight[h * dim + half:h * dim + half + pairs, 0] = amp * torch.sin(-j * w[:pairs])

    @torch.no_grad()
    def _init_circuit(self):
        """On top of _init_prev: layer 0's heads carry the tokens 1, 2, 3 back in directions of their own, and
        layer 1's heads match them between query and record and copy the matched token."""
        m = self.m
        dim, half, hidden = m["dim"], m["dim"] // 2, m["hidden"]
        group, std = m["heads"] // m["kv"], .1

        def orth(rows, cols):
            n = max(rows, cols)
            return torch.linalg.qr(torch.randn(n, n))[0][:rows, :cols]

        self.emb.weight.normal_(std=std)
        self.emb.weight[:, 0] = std * math.sqrt(hidden) * .5
        b0, b1 = self.blocks[0], self.blocks[1]
        carried, wide = {}, math.sqrt(max(1., hidden / dim))
        v0 = orth(dim, hidden)                               # the same values for all heads of layer 0,
        v0[:, 0] = 0                                         # without the constant
        b0.v.weight.copy_(v0.repeat(m["kv"], 1))
        b0.o.weight.mul_(.05)
        for h in range(m["heads"]):
            j = self._tokens_back(h)
            if j in carried:
                continue
            o = orth(hidden, dim) * wide
            o[0] = 0
            b0.o.weight[:, h * dim:(h + 1) * dim] = o * std * 1.2
            carried[j] = o @ v0
        carried[0] = torch.eye(hidden) * wide
        carried[0][0, 0] = 0
        slow = list(range(half * 9 // 16, half))             # pairs that turn slowly
        dims = slow + [half + i for i in slow]
        d1, d2 = dims[0::2], dims[1::2]
        u1, u2 = orth(len(d1), dim) @ v0, orth(len(d2), dim) @ v0
        alpha = 4.0 / wide ** 2

        def put(linear, head, first, second):
            w = torch.randn(dim, hidden) * .02
            w[d1] += alpha * u1 @ carried[first].T
            if second is not None:
                w[d2] += alpha * u2 @ carried[second].T
            linear.weight[head * dim:(head + 1) * dim] = w

        for kv in range(m["kv"]):
            two_back = kv < (m["kv"] // 2 or 1)
            put(b1.k, kv, *((2, 3) if two_back else (1, 2)))
            v = orth(dim, hidden)
            b1.v.weight[kv * dim:(kv + 1) * dim] = v
            for h in range(kv * group, (kv + 1) * group):
                put(b1.q, h, *((1, 2) if two_back else (0, 1 if h % group == 0 else None)))
                b1.o.weight[:, h * dim:(h + 1) * dim] = v.T * std * 1.5
                b1.o.weight[0, h * dim:(h + 1) * dim] = 0


# ---- Hugging Face folders -----------------------------------------------------------------
def named_tensors(net):
    out, phi3 = {"model.embed_tokens.weight": net.emb.weight, "model.norm.weight": net.norm.weight}, \
        net.m["arch"] == "phi3"
    for i, b in enumerate(net.blocks):
        layer = {"input_layernorm": b.n1.weight, "post_attention_layernorm": b.n2.weight,
                 "self_attn.o_proj": b.o.weight, "mlp.down_proj": b.down.weight}
        if phi3:
            layer["self_attn.qkv_proj"] = torch.cat([b.q.weight, b.k.weight, b.v.weight])
            layer["mlp.gate_up_proj"] = torch.cat([b.gate.weight, b.up.weight])
        else:
            layer.update({"self_attn.q_proj": b.q.weight, "self_attn.k_proj": b.k.weight,
                          "self_attn.v_proj": b.v.weight, "mlp.gate_proj": b.gate.weight,
                          "mlp.up_proj": b.up.weight})
        out.update({f"model.layers.{i}.{name}.weight": w for name, w in layer.items()})
    return out


def config(m):
    c = {"architectures": ["LlamaForCausalLM" if m["arch"] == "llama" else "Phi3ForCausalLM"],
         "model_type": m["arch"], "vocab_size": tasks.VOCAB, "hidden_size": m["hidden"],
         "intermediate_size": m["inter"], "num_hidden_layers": m["layers"], "num_attention_heads": m["heads"],
         "num_key_value_heads": m["kv"], "head_dim": m["dim"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "max_position_embeddings": m["maxpos"], "tie_word_embeddings": True, "attention_bias": False,
         "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
         "bos_token_id": tasks.S["BOS"], "eos_token_id": tasks.S["EOS"], "pad_token_id": tasks.S["PAD"],
         "rope_theta": m["theta"]}
    if m["arch"] == "llama":
        c.update(mlp_bias=False, rope_scaling=None,
                 rope_parameters={"rope_type": "default", "rope_theta": m["theta"]})
    else:
        r = {"rope_type": "longrope", "short_factor": [1.0] * (m["dim"] // 2), "long_factor": long_factors(m)}
        c.update(original_max_position_embeddings=m["origpos"], sliding_window=None, resid_pdrop=0.0,
                 embd_pdrop=0.0, partial_rotary_factor=1.0, rope_scaling={**r, "type": "longrope"},
                 rope_parameters={**r, "rope_theta": m["theta"], "partial_rotary_factor": 1.0,
                                  "original_max_position_embeddings": m["origpos"]})
    return c


def write_json(folder, name, value):
    path = os.path.join(folder, name)
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


@torch.no_grad()
def export(net, folder):
    """Write the folder; each file appears whole, so a reader meets no half-written one."""
    os.makedirs(folder, exist_ok=True)
    shards, size = [{}], 0
    for name, t in named_tensors(net).items():
        if size + t.numel() * 2 > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = t.detach().to("cpu", torch.bfloat16).contiguous()
        size += t.numel() * 2
    where = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        path = os.path.join(folder, name)
        save_file(shard, path + ".tmp", metadata={"format": "pt"})
        os.chmod(path + ".tmp", 0o644)
        os.replace(path + ".tmp", path)
        where.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(t.numel() * 2 for shard in shards for t in shard.values())
        write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder, "config.json", config(net.m))
    write_json(folder, "generation_config.json", {"bos_token_id": tasks.S["BOS"], "eos_token_id": tasks.S["EOS"],
                                                  "pad_token_id": tasks.S["PAD"]})
    write_json(folder, "vocab.json", tasks.vocab_json())


@torch.no_grad()
def load_export(m, folder, device):
    """A net with the exported (bfloat16-rounded) weights, kept in float32."""
    net, t = Net(m), {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            t.update(load_file(os.path.join(folder, name)))
    net.emb.weight.copy_(t["model.embed_tokens.weight"])
    net.norm.weight.copy_(t["model.norm.weight"])
    for i, b in enumerate(net.blocks):
        def get(name):
            return t[f"model.layers.{i}.{name}.weight"]
        b.n1.weight.copy_(get("input_layernorm"))
        b.n2.weight.copy_(get("post_attention_layernorm"))
        b.o.weight.copy_(get("self_attn.o_proj"))
        b.down.weight.copy_(get("mlp.down_proj"))
        if m["arch"] == "phi3":
            rows = m["kv"] * m["dim"]
            q, k, v = get("self_attn.qkv_proj").split([m["heads"] * m["dim"], rows, rows])
            gate, up = get("mlp.gate_up_proj").chunk(2)
        else:
            q, k, v = (get(f"self_attn.{x}_proj") for x in "qkv")
            gate, up = get("mlp.gate_proj"), get("mlp.up_proj")
        for linear, w in ((b.q, q), (b.k, k), (b.v, v), (b.gate, gate), (b.up, up)):
            linear.weight.copy_(w)
    return net.to(device).eval()
