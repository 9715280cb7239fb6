"""Small checkpoints on disk, in both layouts, for the converters' tests."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 128
HEAD_DIM = HIDDEN // HEADS


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes metadata and tensors as a GGUF file."""

    def write(
        architecture: str,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            add_metadata(writer, key, value)
        for tensor, array in tensors.items():
            writer.add_tensor(tensor, array, raw_dtype=(types or {}).get(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture
def decoder_metadata() -> Callable[..., dict[str, Any]]:
    """Return a function that gives a tiny decoder's metadata under an architecture's prefix."""

    def make(architecture: str, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "context_length": 256,
            "embedding_length": HIDDEN,
            "block_count": LAYERS,
            "feed_forward_length": FFN,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return {f"{architecture}.{key}": value for key, value in values.items()}

    return make


@pytest.fixture
def decoder_tensors() -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that gives random float32 tensors under llama.cpp's names."""

    def make(layer: Mapping[str, Sequence[int]], untied: bool = True) -> dict[str, np.ndarray]:
        shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
        if untied:
            shapes["output.weight"] = (VOCAB, HIDDEN)
        for index in range(LAYERS):
            shapes |= {f"blk.{index}.{name}": tuple(shape) for name, shape in layer.items()}
        rng = np.random.default_rng(0)
        return {
            name: rng.standard_normal(shape, np.float32) for name, shape in sorted(shapes.items())
        }

    return make


@pytest.fixture
def llama_layer() -> dict[str, tuple[int, ...]]:
    """The tensors of one layer with separate q, k, v and a gated feed-forward."""
    return {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (FFN, HIDDEN),
        "ffn_up.weight": (FFN, HIDDEN),
        "ffn_down.weight": (HIDDEN, FFN),
    }
