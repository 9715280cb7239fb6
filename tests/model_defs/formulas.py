"""The families that transformers lacks, written out once more: one formula after another, float64.

Each function computes a text's logits (or scores) from a config.json and the checkpoint's tensors
under their original names, without caches, pages, fusing or sharing of code between families
beyond what the formulas share. They are held against the stored outputs of the original code, and
our models against them where the config says something that no stored checkpoint does.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import erf

Config = Mapping[str, Any]


class Checkpoint:
    """Tensors by name; those that are asked for and not there yet are made at random."""

    def __init__(self, tensors: Mapping[str, np.ndarray] | None = None):
        self.is_given = tensors is not None
        self.tensors = dict(tensors or {})

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        """The tensor in float64; AssertionError where it has another shape."""
        if name not in self.tensors and not self.is_given:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            noise = rng.normal(size=shape)
            if name.endswith("bias"):
                noise *= 0.2
            elif len(shape) == 1:
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.5 if "embed" in name or "wte" in name else 1.2 / shape[1] ** 0.5
            self.tensors[name] = noise.astype(np.float32)
        tensor = self.tensors[name]
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor.astype(np.float64)

    def linear(self, x: np.ndarray, name: str, out: int, *, bias: bool = False) -> np.ndarray:
        y = x @ self(f"{name}.weight", out, x.shape[-1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def rms_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return y * self(name, x.shape[-1])

    def layer_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        y = x - x.mean(-1, keepdims=True)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + eps)
        return y * self(f"{name}.weight", x.shape[-1]) + self(f"{name}.bias", x.shape[-1])


# ---- what the formulas share -----------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / 2**0.5)) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def softmax(x: np.ndarray) -> np.ndarray:
    y = np.exp(x - x.max(-1, keepdims=True))
    return y / y.sum(-1, keepdims=True)


def frequencies(theta: float, dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, dim, 2) / dim)


def rotate(x: np.ndarray, freqs: np.ndarray, magnitude: float = 1.0) -> np.ndarray:
    """Turn the pairs (i, i + d/2) of `x` `[T, N, H]`, the first d of each head."""
    half = len(freqs)
    turn = magnitude * np.exp(1j * np.arange(len(x))[:, None] * freqs)[:, None]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def rotate_neighbours(x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """Turn the pairs (2i, 2i + 1)."""
    dim = 2 * len(freqs)
    turn = np.exp(1j * np.arange(len(x))[:, None] * freqs)[:, None]
    turned = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turn
    pairs = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], dim)
    return np.concatenate([pairs, x[..., dim:]], -1)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    *,
    cap: float | None = None,
    bias: np.ndarray | float = 0.0,
    seen: np.ndarray | bool = True,
) -> np.ndarray:
    """Causal attention of `q` `[T, N, H]` over `[T, K, H]`; `bias` and `seen` are `[N, T, T]`."""
    length, heads, _ = q.shape
    k, v = (np.repeat(part, heads // part.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("inh,jnh->nij", q, k) * scale + bias
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    scores = np.where(np.tri(length, dtype=bool) & seen, scores, -np.inf)
    return np.einsum("nij,jnh->inh", softmax(scores), v).reshape(length, -1)


def gated(w: Checkpoint, x: np.ndarray, at: str, width: int, names: str, act=silu) -> np.ndarray:
    """`names`: gate, up and down."""
    gate, up, down = names.split()
    inner = act(w.linear(x, f"{at}.{gate}", width)) * w.linear(x, f"{at}.{up}", width)
    return w.linear(inner, f"{at}.{down}", x.shape[-1])


GATE_UP_DOWN = "gate_proj up_proj down_proj"


def routed(
    w: Checkpoint,
    x: np.ndarray,
    place: str,
    scores: np.ndarray,
    top_k: int,
    width: int,
    *,
    names: str = GATE_UP_DOWN,
    act: Any = silu,
    eps: float | None = None,
) -> np.ndarray:
    """The `top_k` experts of the largest `scores` `[T, E]`; with `eps` they count 1 together."""
    weights = np.where(scores >= np.sort(scores, -1)[:, -top_k, None], scores, 0.0)
    if eps is not None:
        weights = weights / (weights.sum(-1, keepdims=True) + eps)
    outputs = [
        gated(w, x, f"{place}.experts.{e}", width, names, act) for e in range(scores.shape[1])
    ]
    return np.einsum("te,etd->td", weights, np.stack(outputs))


# ---- the families ----------------------------------------------------------------------------


def qwen(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, dim, longest = (
        *(c["hidden_size"], c["num_attention_heads"], c["kv_channels"], c["seq_length"]),
    )
    rotary, length = int(dim * c["rotary_pct"]), len(ids)
    alpha = 1.0
    if c["use_dynamic_ntk"]:
        alpha = max(2 ** math.ceil(math.log(length / longest, 2) + 1) - 1, 1)
    freqs = frequencies(c["rotary_emb_base"] * alpha ** (rotary / (rotary - 2)), rotary)
    logn = np.ones(length)
    if c["use_logn_attn"]:
        logn = np.array([max(math.log(p + 1, longest), 1.0) for p in range(length)])
    x = w("transformer.wte.weight", c["vocab_size"], width)[list(ids)]
    for i in range(c["num_hidden_layers"]):
        at = f"transformer.h.{i}"
        h = w.rms_norm(x, f"{at}.ln_1.weight", c["layer_norm_epsilon"])
        qkv = w.linear(h, f"{at}.attn.c_attn", 3 * width, bias=True)
        q, k, v = (part.reshape(length, heads, dim) for part in np.split(qkv, 3, axis=-1))
        q, k = rotate(q, freqs) * logn[:, None, None], rotate(k, freqs)
        bias = not c["no_bias"]
        x = x + w.linear(attend(q, k, v, dim**-0.5), f"{at}.attn.c_proj", width, bias=bias)
        h = w.rms_norm(x, f"{at}.ln_2.weight", c["layer_norm_epsilon"])
        inner = c["intermediate_size"] // 2
        up, gate = (w.linear(h, f"{at}.mlp.{n}", inner, bias=bias) for n in ("w1", "w2"))
        x = x + w.linear(up * silu(gate), f"{at}.mlp.c_proj", width, bias=bias)
    x = w.rms_norm(x, "transformer.ln_f.weight", c["layer_norm_epsilon"])
    return w.linear(x, "lm_head", c["vocab_size"])


def llama_attention(c: Config, w: Checkpoint, h: np.ndarray, at: str, rope: Any) -> np.ndarray:
    """With separate projections; `attention_bias` for all four."""
    heads, bias = c["num_attention_heads"], c.get("attention_bias", False)
    kv_heads, dim = c.get("num_key_value_heads", heads), h.shape[-1] // heads
    q, k, v = (
        w.linear(h, f"{at}.{name}_proj", n * dim, bias=bias).reshape(len(h), n, dim)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    out = attend(rope(q), rope(k), v, dim**-0.5)
    return w.linear(out, f"{at}.o_proj", h.shape[-1], bias=bias)


def linear_rope(c: Config, dim: int) -> Any:
    freqs = frequencies(c.get("rope_theta", 10000.0), dim)
    scaling = c.get("rope_scaling") or {"type": "linear", "factor": 1.0}
    assert scaling["type"] == "linear"
    return lambda x: rotate(x, freqs / scaling["factor"])


def deepseek_moe(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, eps = c["hidden_size"], c["rms_norm_eps"]
    rope = linear_rope(c, width // c["num_attention_heads"])
    x = w("model.embed_tokens.weight", c["vocab_size"], width)[list(ids)]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = w.rms_norm(x, f"{at}.input_layernorm.weight", eps)
        x = x + llama_attention(c, w, h, f"{at}.self_attn", rope)
        h = w.rms_norm(x, f"{at}.post_attention_layernorm.weight", eps)
        if i < c["first_k_dense_replace"] or i % c["moe_layer_freq"]:
            x = x + gated(w, h, f"{at}.mlp", c["intermediate_size"], GATE_UP_DOWN)
            continue
        inner = c["moe_intermediate_size"]
        scores = softmax(w.linear(h, f"{at}.mlp.gate", c["n_routed_experts"]))
        top_k, eps_sum = c["num_experts_per_tok"], 1e-20 if c["norm_topk_prob"] else None
        x = x + routed(w, h, f"{at}.mlp", scores, top_k, inner, eps=eps_sum)
        if shared := c["n_shared_experts"]:
            x = x + gated(w, h, f"{at}.mlp.shared_experts", inner * shared, GATE_UP_DOWN)
    x = w.rms_norm(x, "model.norm.weight", eps)
    return w.linear(x, "lm_head", c["vocab_size"])


def grok1(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim, eps, count = width // heads, c["rms_norm_eps"], c["num_experts"]
    act = gelu_tanh if c.get("hidden_act") == "gelu_pytorch_tanh" else gelu
    freqs = frequencies(c.get("rope_theta", 10000.0), dim)
    table = w("model.embed_tokens.weight", c["vocab_size"], width)
    x = table[list(ids)] * c["embedding_multiplier_scale"]

    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = w.rms_norm(x, f"{at}.pre_attn_norm.scale", eps)
        q, k, v = (
            w.linear(h, f"{at}.attn.{name}_proj", n * dim).reshape(len(h), n, dim)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q, freqs), rotate(k, freqs)
        out = attend(q, k, v, c["attn_output_multiplier"], cap=c["max_attn_value"])
        y = w.linear(out, f"{at}.attn.o_proj", width)
        x = x + w.rms_norm(y, f"{at}.post_attn_norm.scale", eps)
        h = w.rms_norm(x, f"{at}.pre_moe_norm.scale", eps)
        scores = softmax(w.linear(h, f"{at}.moe_block.gate", count))
        top_k, inner = c["num_experts_per_tok"], c["intermediate_size"]
        names = "linear linear_v linear_1"
        y = routed(w, h, f"{at}.moe_block", scores, top_k, inner, names=names, act=act)
        x = x + w.rms_norm(y, f"{at}.post_moe_norm.scale", eps)
    x = w.rms_norm(x, "model.norm.scale", eps)
    tied = c.get("tie_word_embeddings", True)
    logits = x @ table.T if tied else w.linear(x, "lm_head", c["vocab_size"])
    return logits * c["output_multiplier_scale"]


def chatglm(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, dim = c["hidden_size"], c["num_attention_heads"], c["kv_channels"]
    many = c["multi_query_attention"]
    groups, inner = c["multi_query_group_num"] if many else heads, c["ffn_hidden_size"]
    freqs = frequencies(10000.0 * c.get("rope_ratio", 1), dim // 2)
    everywhere = c["add_bias_linear"]
    length, after = len(ids), c["apply_residual_connection_post_layernorm"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if c["rmsnorm"]:
            return w.rms_norm(x, f"{name}.weight", c["layernorm_epsilon"])
        return w.layer_norm(x, name, c["layernorm_epsilon"])

    table = "transformer.embedding.word_embeddings.weight"
    x = w(table, c["padded_vocab_size"], width)[list(ids)]
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        qkv = w.linear(
            h,
            f"{at}.self_attention.query_key_value",
            (heads + 2 * groups) * dim,
            bias=everywhere or c["add_qkv_bias"],
        )
        if many:
            parts = np.split(qkv, [heads * dim, (heads + groups) * dim], axis=-1)
            q, k, v = (part.reshape(length, -1, dim) for part in parts)
        else:
            q, k, v = np.split(qkv.reshape(length, heads, 3 * dim), 3, axis=-1)
        q, k = rotate_neighbours(q, freqs), rotate_neighbours(k, freqs)
        out = attend(q, k, v, dim**-0.5)
        y = w.linear(out, f"{at}.self_attention.dense", width, bias=everywhere)
        x = (h if after else x) + y
        h = norm(x, f"{at}.post_attention_layernorm")
        both = w.linear(h, f"{at}.mlp.dense_h_to_4h", 2 * inner, bias=everywhere)
        y = silu(both[:, :inner]) * both[:, inner:]
        y = w.linear(y, f"{at}.mlp.dense_4h_to_h", width, bias=everywhere)
        x = (h if after else x) + y
    x = norm(x, "transformer.encoder.final_layernorm")
    return w.linear(x, "transformer.output_layer", c["padded_vocab_size"])


def internlm2(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim, length, longest = width // heads, len(ids), c["max_position_embeddings"]
    theta, scaling = c["rope_theta"], c.get("rope_scaling") or {}
    if scaling.get("type") == "dynamic" and length > longest:
        grown = scaling["factor"] * length / longest - (scaling["factor"] - 1)
        theta *= grown ** (dim / (dim - 2))
    freqs = frequencies(theta, dim)
    if scaling.get("type") == "linear":
        freqs = freqs / scaling["factor"]
    x = w("model.tok_embeddings.weight", c["vocab_size"], width)[list(ids)]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = w.rms_norm(x, f"{at}.attention_norm.weight", c["rms_norm_eps"])
        qkv = w.linear(h, f"{at}.attention.wqkv", (heads + 2 * kv_heads) * dim, bias=c["bias"])
        qkv = qkv.reshape(length, kv_heads, -1, dim)
        q = rotate(qkv[:, :, :-2].reshape(length, heads, dim), freqs)
        k, v = rotate(qkv[:, :, -2], freqs), qkv[:, :, -1]
        out = attend(q, k, v, dim**-0.5)
        x = x + w.linear(out, f"{at}.attention.wo", width, bias=c["bias"])
        h = w.rms_norm(x, f"{at}.ffn_norm.weight", c["rms_norm_eps"])
        x = x + gated(w, h, f"{at}.feed_forward", c["intermediate_size"], "w1 w3 w2")
    x = w.rms_norm(x, "model.norm.weight", c["rms_norm_eps"])
    if c["architectures"][0].endswith("RewardModel"):
        return w.linear(x, "v_head", 1)
    return w.linear(x, "output", c["vocab_size"])


def baichuan(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
    dim, length = width // heads, len(ids)
    bias: Any = 0.0
    if "max_position_embeddings" not in c:
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
        slopes += [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
        places = np.arange(length)
        bias = np.array(slopes[:heads])[:, None, None] * (places[None, :] - places[:, None])
    freqs = frequencies(10000.0, dim)
    x = w("model.embed_tokens.weight", c["vocab_size"], width)[list(ids)]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = w.rms_norm(x, f"{at}.input_layernorm.weight", eps)
        qkv = w.linear(h, f"{at}.self_attn.W_pack", 3 * width)
        q, k, v = (part.reshape(length, heads, dim) for part in np.split(qkv, 3, axis=-1))
        if "max_position_embeddings" in c:
            q, k = rotate(q, freqs), rotate(k, freqs)
        out = attend(q, k, v, dim**-0.5, bias=bias)
        x = x + w.linear(out, f"{at}.self_attn.o_proj", width)
        h = w.rms_norm(x, f"{at}.post_attention_layernorm.weight", eps)
        x = x + gated(w, h, f"{at}.mlp", c["intermediate_size"], GATE_UP_DOWN)
    x = w.rms_norm(x, "model.norm.weight", eps)
    head = w("lm_head.weight", c["vocab_size"], width)
    if c["vocab_size"] != 64000:  # of the first generation, whose head is plain
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return x @ head.T


def llama(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    """MiniCPM, which has factors in three places, and XVERSE, which may have experts."""
    width, eps = c["hidden_size"], c["rms_norm_eps"]
    rope = linear_rope(c, width // c["num_attention_heads"])
    table = w("model.embed_tokens.weight", c["vocab_size"], width)
    x = table[list(ids)] * c.get("scale_emb", 1)
    depth = c["num_hidden_layers"]
    branch = c["scale_depth"] / depth**0.5 if "scale_depth" in c else 1.0
    for i in range(depth):
        at = f"model.layers.{i}"
        h = w.rms_norm(x, f"{at}.input_layernorm.weight", eps)
        x = x + branch * llama_attention(c, w, h, f"{at}.self_attn", rope)
        h = w.rms_norm(x, f"{at}.post_attention_layernorm.weight", eps)
        inner, mlp = c["intermediate_size"], f"{at}.mlp"
        if "num_experts" not in c:
            x = x + branch * gated(w, h, mlp, inner, GATE_UP_DOWN)
            continue
        scores = softmax(w.linear(h, f"{mlp}.router", c["num_experts"]))
        x = x + routed(w, h, mlp, scores, c["moe_top_k"], inner, eps=1e-6)
        if shared := c["num_shared_experts"]:
            x = x + gated(w, h, f"{mlp}.shared_experts", inner * shared, GATE_UP_DOWN)
    x = w.rms_norm(x, "model.norm.weight", eps)
    if "dim_model_base" in c:
        x = x * c["dim_model_base"] / width
    tied = c.get("tie_word_embeddings", False)
    return x @ table.T if tied else w.linear(x, "lm_head", c["vocab_size"])


def exaone(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim, eps, length = width // heads, c["layer_norm_epsilon"], len(ids)
    freqs = frequencies(c["rope_theta"], dim)
    if scaling := c.get("rope_scaling"):
        assert scaling["rope_type"] == "llama3"
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / scaling["factor"]
    table = w("transformer.wte.weight", c["vocab_size"], width)
    x = table[list(ids)]
    for i in range(c["num_layers"]):
        at = f"transformer.h.{i}"
        h = w.rms_norm(x, f"{at}.ln_1.weight", eps)
        place = f"{at}.attn.attention"
        q, k, v = (
            w.linear(h, f"{place}.{name}_proj", n * dim).reshape(length, n, dim)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        out = attend(rotate(q, freqs), rotate(k, freqs), v, dim**-0.5)
        x = x + w.linear(out, f"{place}.out_proj", width)
        h = w.rms_norm(x, f"{at}.ln_2.weight", eps)
        x = x + gated(w, h, f"{at}.mlp", c["intermediate_size"], "c_fc_0 c_fc_1 c_proj")
    x = w.rms_norm(x, "transformer.ln_f.weight", eps)
    return x @ table.T if c["tie_word_embeddings"] else w.linear(x, "lm_head", c["vocab_size"])


def phi3small(c: Config, w: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    width, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim, eps, length = width // heads, c["layer_norm_epsilon"], len(ids)
    freqs, magnitude = frequencies(c["rope_embedding_base"], dim), 1.0
    if scaling := c["rope_scaling"]:
        original, longest = (
            scaling["original_max_position_embeddings"],
            c["max_position_embeddings"],
        )
        if length > original:
            freqs = freqs / np.array(scaling["long_factor"])
            usual = (1 + math.log(longest / original) / math.log(original)) ** 0.5
            magnitude = scaling.get("long_mscale", usual)
        else:
            freqs = freqs / np.array(scaling["short_factor"])
            magnitude = scaling.get("short_mscale", 1.0)
    else:
        freqs = freqs * c["rope_position_scale"]
    scale = c["mup_attn_multiplier"] / dim if c["mup_use_scaling"] else dim**-0.5

    stride, block = c["blocksparse_vert_stride"], c["blocksparse_block_size"]
    step = 0 if c["blocksparse_homo_head_pattern"] else max(1, stride // heads)
    blocks = np.arange(length) // block
    back = blocks[:, None] - blocks[None, :]
    upright = [(blocks[None, :] + h * step + 1) % stride == 0 for h in range(heads)]
    seen = (back < c["blocksparse_num_local_blocks"]) | np.stack(upright)

    table = w("model.embed_tokens.weight", c["vocab_size"], width)
    x = table[list(ids)] * c["mup_embedding_multiplier"]
    every = c["dense_attention_every_n_layers"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = w.layer_norm(x, f"{at}.input_layernorm", eps)
        size = (heads + 2 * kv_heads) * dim
        qkv = w.linear(h, f"{at}.self_attn.query_key_value", size, bias=True)
        qkv = qkv.reshape(length, kv_heads, -1, dim)
        q = rotate(qkv[:, :, :-2].reshape(length, heads, dim), freqs, magnitude)
        k, v = rotate(qkv[:, :, -2], freqs, magnitude), qkv[:, :, -1]
        dense = bool(every) and (i + 1) % every == 0
        out = attend(q, k, v, scale, seen=True if dense else seen)
        x = x + w.linear(out, f"{at}.self_attn.dense", width, bias=True)
        h = w.layer_norm(x, f"{at}.post_attention_layernorm", eps)
        both = w.linear(h, f"{at}.mlp.up_proj", 2 * c["ff_intermediate_size"], bias=True)
        gate, up = both[:, 0::2], both[:, 1::2]
        if (limit := c["gegelu_limit"]) is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        inner = gate * sigmoid(1.702 * gate) * (up + 1)
        x = x + w.linear(inner, f"{at}.mlp.down_proj", width, bias=True)
    x = w.layer_norm(x, "model.final_layernorm", eps)
    return x @ table.T / c["mup_width_multiplier"]
