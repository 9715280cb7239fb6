"""A Llama checkpoint of any size, written without transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.hf import write_hf

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """Return the HF name and shape of every tensor."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    found = {"lm_head.weight": (vocab, hidden), "model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def tensors(
    config: Mapping[str, Any] = CONFIG, dtype: Any = np.float32
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor with random values, NaN, infinities and -0 among them."""
    rng = np.random.default_rng(0)
    for name, shape in shapes(config).items():
        tensor = rng.standard_normal(shape, np.float32).astype(dtype)
        tensor.reshape(-1)[:4] = np.array([np.nan, np.inf, -np.inf, -0.0], dtype)
        yield name, tensor


def write(
    folder: Path, changes: Mapping[str, Any] | None = None, dtype: Any = np.float32,
    max_shard_bytes: int = 20_000,
) -> Path:  # fmt: skip
    """Write the checkpoint, sharded, and return its folder."""
    config = {**CONFIG, **(changes or {})}
    return write_hf(
        folder, config, tensors(config, dtype), max_shard_bytes=max_shard_bytes,
        generation_config={"eos_token_id": 2},
    )  # fmt: skip
