"""Present a GGUF file as an HF checkpoint: HF's config keys, tensor names and row order, float32.

What llama.cpp changed when it converted the model is undone here: rotary rows of q and k, Gemma's
norm offset, rope factors stored as tensors. `ARCHITECTURES` holds one row per GGUF architecture;
support another by adding a row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.demo import default_cache_dir
from converters.errors import CheckpointError
from converters.gguf_file import GGUFFile, GGUFTensor, read_gguf
from converters.gguf_tokenizer import cached_tokenizer, end_of_generation_ids
from converters.interface import Index, TensorHeader, slice_bounds

READ_CHUNK_VALUES = 1 << 22
CONSUMED_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that become part of the config, never of the weights."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")

COMMON_KEYS = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.causal",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scale_linear",
    }
)
"""Metadata keys, without the architecture's prefix, that are read or change nothing."""


class Metadata:
    """A GGUF file's metadata, read by names that leave out the architecture prefix."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number; floats in the shortest spelling that gives the stored float32."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.file.path} lacks the metadata key {self.architecture}.{key}. "
                "Convert the model again with a current llama.cpp."
            )
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"{self.file.path}: {self.architecture}.{key} differs per layer "
                    f"({value[:4]}…), which is not supported. Use the model's original HF "
                    "checkpoint."
                )
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def values(self, tensor: str) -> list[float]:
        """Return a small float tensor that belongs to the config."""
        rows = self.file.tensors[tensor].read_rows(0, 1)
        return [float(str(value)) for value in rows.reshape(-1)]

    def has_tensor(self, name: str) -> bool:
        return name in self.file.tensors


@dataclass(frozen=True)
class GGUFArchitecture:
    """How one GGUF architecture becomes an HF model.

    `layer_modules` are HF's module names in a layer (each may have a weight and a bias); `config`
    gives the config keys beyond those all decoders share; `norm_offset` was added to every norm's
    weight by the conversion; `permuted` are the modules whose rotary rows it interleaved.
    """

    hf_architecture: str
    model_type: str
    layer_modules: tuple[str, ...]
    config: Callable[[Metadata], dict[str, Any]]
    rope_theta: float = 10000.0
    norm_offset: float = 0.0
    permuted: tuple[str, ...] = ()
    extra_keys: frozenset[str] = field(default=frozenset())


def _llama_config(metadata: Metadata) -> dict[str, Any]:
    config = {
        "hidden_act": "silu",
        "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias"),
        "rope_scaling": _rope_scaling(metadata),
    }
    if metadata.has_tensor("rope_freqs.weight"):
        config["rope_scaling"] = _llama3_scaling(metadata)
    if metadata.get("attention.sliding_window"):
        # Llama has no window; Mistral is the same layers with one.
        config["architectures"] = ["MistralForCausalLM"]
        config["model_type"] = "mistral"
        config["sliding_window"] = metadata.number("attention.sliding_window")
        del config["attention_bias"], config["mlp_bias"]
    return config


def _qwen2_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "rope_scaling": _rope_scaling(metadata),
        "use_sliding_window": False,
    }


def _gemma3_config(metadata: Metadata) -> dict[str, Any]:
    heads, hidden = metadata.number("attention.head_count"), metadata.number("embedding_length")
    head_dim = metadata.number("attention.key_length", 256)
    # Only the 27B model (62 layers) scales queries by the width per head; the file does not say so.
    scalar = hidden // heads if metadata.number("block_count") == 62 else head_dim
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
        "sliding_window": metadata.number("attention.sliding_window", 1024),
        "sliding_window_pattern": metadata.number("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
    }


def _phi3_config(metadata: Metadata) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": metadata.get("attention.sliding_window") or None,
        "rope_scaling": _rope_scaling(metadata),
    }
    head_dim = _head_dim(metadata)
    rotary_dim = metadata.number("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if metadata.has_tensor("rope_factors_long.weight"):
        config["rope_scaling"] = {
            "type": "longrope",
            "short_factor": metadata.values("rope_factors_short.weight"),
            "long_factor": metadata.values("rope_factors_long.weight"),
        }
        config["original_max_position_embeddings"] = metadata.number(
            "rope.scaling.original_context_length"
        )
    return config


ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        "LlamaForCausalLM",
        "llama",
        (*PRE_NORMS, *ATTENTION, *GATED_MLP),
        _llama_config,
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "qwen2": GGUFArchitecture(
        "Qwen2ForCausalLM", "qwen2", (*PRE_NORMS, *ATTENTION, *GATED_MLP), _qwen2_config
    ),
    "gemma3": GGUFArchitecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        (
            *PRE_NORMS,
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            *ATTENTION,
            "self_attn.q_norm",
            "self_attn.k_norm",
            *GATED_MLP,
        ),
        _gemma3_config,
        rope_theta=1_000_000.0,
        norm_offset=1.0,
        extra_keys=frozenset(
            {"final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"}
        ),
    ),
    "phi3": GGUFArchitecture(
        "Phi3ForCausalLM",
        "phi3",
        (
            *PRE_NORMS,
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ),
        _phi3_config,
    ),
}
"""GGUF's general.architecture -> its HF counterpart."""


class GGUFCheckpoint:
    """A GGUF file (or the first part of a split one) seen as an HF checkpoint in float32.

    Args:
        cache_dir: where the tokenizer rebuilt from the file is kept; None: the user's cache folder.

    Raises CheckpointError for a damaged file, an architecture without a row in `ARCHITECTURES`,
    metadata or tensors it would have to guess about, and quantizations that cannot be undone.
    """

    canonical = False

    def __init__(self, path: str | Path, cache_dir: Path | None = None):
        self.path = Path(path)
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self._file = read_gguf(self.path)
        metadata = Metadata(self._file)
        self._architecture = _find_architecture(metadata)
        self.config = _make_config(metadata, self._architecture)
        self.generation_config = _make_generation_config(metadata)
        self._tensors = _map_names(metadata, self._architecture)
        self.headers: Mapping[str, TensorHeader] = {
            name: TensorHeader(name, tensor.shape, np.dtype(np.float32))
            for name, tensor in self._tensors.items()
        }

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder with the tokenizer.json rebuilt from this file, made on first use.

        None when the file has no vocabulary; CheckpointError when it is of a kind not supported.
        """
        return cached_tokenizer(self._file, self._cache_dir / "tokenizers")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Dequantize one tensor, or the part that `index` names, to float32.

        Only the rows asked for are read; columns are cut after dequantizing. KeyError for a name
        not in `headers`.
        """
        tensor = self._tensors[name]
        bounds = slice_bounds(name, tensor.shape, index)
        out = np.empty([stop - start for start, stop in bounds], np.float32)
        if out.size == 0:
            return out
        order = self._row_order(name)
        if len(tensor.shape) == 1:
            values = tensor.read_rows(0, 1)[0]
            out[...] = (values if order is None else values[order])[slice(*bounds[0])]
        else:
            _read_matrix(tensor, bounds, order, out)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            out -= self._architecture.norm_offset
        return out

    def _row_order(self, name: str) -> np.ndarray | None:
        """The stored row of each HF row, or None where they are the same.

        llama.cpp turns q and k rows from halves (HF: x[i] with x[i + H/2]) into neighbouring pairs.
        """
        module, _, _ = name.rpartition(".")
        permuted = next((m for m in self._architecture.permuted if module.endswith(m)), None)
        if permuted is None:
            return None
        num_rows = self._tensors[name].shape[0]
        heads = "num_attention_heads" if permuted.endswith("q_proj") else "num_key_value_heads"
        stored = np.arange(num_rows).reshape(self.config[heads], -1, 2)
        return stored.swapaxes(1, 2).reshape(-1)


def _read_matrix(
    tensor: GGUFTensor,
    bounds: tuple[tuple[int, int], ...],
    order: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """Fill `out` with the part `bounds` of a tensor of two or more axes, chunk by chunk."""
    rows_per_item = tensor.num_rows // tensor.shape[0]
    step = max(1, READ_CHUNK_VALUES // (rows_per_item * tensor.shape[-1]))
    inner = tuple(slice(*bound) for bound in bounds[1:])
    start, stop = bounds[0]
    for first in range(start, stop, step):
        last = min(first + step, stop)
        low, high, chosen = first, last, slice(None)
        if order is not None:
            wanted = order[first:last]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            chosen = wanted - low
        chunk = tensor.read_rows(low * rows_per_item, high * rows_per_item)
        chunk = chunk.reshape(high - low, *tensor.shape[1:])
        out[first - start : last - start] = chunk[chosen][:, *inner]


def _find_architecture(metadata: Metadata) -> GGUFArchitecture:
    path, name = metadata.file.path, metadata.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} has the GGUF architecture {name!r}; supported: {', '.join(ARCHITECTURES)}. "
            "Use the model's original HF checkpoint instead."
        )
    architecture = ARCHITECTURES[name]
    if metadata.get("expert_count"):
        raise CheckpointError(
            f"{path} is a mixture of experts ({name}.expert_count), which is read from HF "
            "checkpoints only. Use the model's original HF checkpoint."
        )
    known = COMMON_KEYS | architecture.extra_keys | {"expert_count", "expert_used_count"}
    prefix = f"{name}."
    unknown = [
        key
        for key in metadata.file.metadata
        if key.startswith(prefix) and key.removeprefix(prefix) not in known
    ]
    if unknown:
        raise CheckpointError(
            f"{path} has metadata that may change the model and is not understood: "
            f"{', '.join(unknown)}. Use the model's original HF checkpoint, or add the keys to "
            "this architecture's row in converters/gguf.py."
        )
    return architecture


def _head_dim(metadata: Metadata) -> int:
    heads, hidden = metadata.number("attention.head_count"), metadata.number("embedding_length")
    return metadata.number("attention.key_length", hidden // heads)


def _make_config(metadata: Metadata, architecture: GGUFArchitecture) -> dict[str, Any]:
    """Write the config.json that HF would have for this model."""
    if not metadata.has_tensor("token_embd.weight"):
        raise CheckpointError(
            f"{metadata.file.path} has no token_embd.weight, so it is not a language model "
            "(perhaps an adapter or a vision part). Give the file of the full model."
        )
    heads = metadata.number("attention.head_count")
    config = {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
        "torch_dtype": "float32",
        "vocab_size": metadata.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": metadata.number("embedding_length"),
        "intermediate_size": metadata.number("feed_forward_length"),
        "num_hidden_layers": metadata.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number("attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata),
        "max_position_embeddings": metadata.number("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", architecture.rope_theta),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "bos_token_id": metadata.file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config | architecture.config(metadata)


def _make_generation_config(metadata: Metadata) -> dict[str, Any]:
    ids = end_of_generation_ids(metadata.file.metadata)
    values = {
        "bos_token_id": metadata.file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ids[0] if len(ids) == 1 else ids or None,
        "pad_token_id": metadata.file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _map_names(metadata: Metadata, architecture: GGUFArchitecture) -> dict[str, GGUFTensor]:
    """Return HF name -> stored tensor; CheckpointError for stored tensors without an HF name."""
    num_layers = metadata.number("block_count")
    arch_id = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == metadata.architecture
    )
    names = gguf.get_tensor_name_map(arch_id, num_layers)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    for layer in range(num_layers):
        modules += [f"model.layers.{layer}.{module}" for module in architecture.layer_modules]
    stored = metadata.file.tensors
    found = {
        f"{module}.{kind}": stored[f"{names.get_name(module)}.{kind}"]
        for module in modules
        for kind in ("weight", "bias")
        if f"{names.get_name(module)}.{kind}" in stored
    }
    unread = stored.keys() - {tensor.name for tensor in found.values()} - set(CONSUMED_TENSORS)
    if unread:
        shown = ", ".join(sorted(unread)[:5])
        raise CheckpointError(
            f"{metadata.file.path} has {len(unread)} tensors that {architecture.hf_architecture} "
            f"has no place for: {shown}{', …' if len(unread) > 5 else ''}. Use the model's "
            "original HF checkpoint."
        )
    return found


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """Return HF's rope_scaling for what the metadata says about it."""
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
    if kind == "none" and factor != 1.0 and metadata.get("rope.scaling.type") is None:
        kind = "linear"  # older files give the factor only
    if kind in ("none", "longrope") or factor in (0.0, 1.0):
        return None
    factor = float(str(np.float32(factor)))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": metadata.number(
                "rope.scaling.original_context_length"
            ),
        }
    raise CheckpointError(
        f"{metadata.file.path}: {metadata.architecture}.rope.scaling.type is {kind!r}; known: "
        "none, linear, yarn, longrope. Use the model's original HF checkpoint."
    )


def _llama3_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """Recover llama3 rope scaling from the divisors of the rotary frequencies it gave.

    The file holds only the divisors. Candidates are Llama 3.1's own numbers and what the divisors
    between 1 and `factor` imply (they lie on a line over frequency); the one that reproduces
    every divisor is right.
    """
    divisors = np.array(metadata.values("rope_freqs.weight"))
    if np.allclose(divisors, 1.0):
        return None
    theta = metadata.number("rope.freq_base", 10000.0)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    factor = float(divisors[-1])
    for low, high, original in _llama3_candidates(divisors, wavelengths, factor):
        if np.allclose(_llama3_divisors(wavelengths, factor, low, high, original), divisors, 1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{metadata.file.path}: rope_freqs.weight holds frequency divisors that are not Llama 3's "
        "rope scaling. Use the model's original HF checkpoint."
    )


def _llama3_candidates(
    divisors: np.ndarray, wavelengths: np.ndarray, factor: float
) -> list[tuple[float, float, int]]:
    """Return (low_freq_factor, high_freq_factor, original length) guesses, most likely first."""
    candidates = [(1.0, 4.0, 8192)]
    if factor <= 1.0:
        return candidates
    between = (divisors > 1.0 + 1e-4) & (divisors < factor * (1 - 1e-4))
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    if between.sum() >= 2:  # smooth = (original / wavelength - low) / (high - low), with low = 1
        slope, offset = np.polyfit(1 / wavelengths[between], smooth[between], 1)
        candidates.append((1.0, round(1 - 1 / offset, 3), round(-slope / offset)))
    elif between.sum() == 1:
        original = (smooth[between] * 3 + 1) * wavelengths[between]
        candidates.append((1.0, 4.0, round(float(original[0]))))
    elif divisors[0] == 1.0:
        unscaled, scaled = wavelengths[divisors == 1.0].max(), wavelengths[divisors > 1.0].min()
        candidates.append((1.0, float(0.999 * int(scaled) / unscaled), int(scaled)))
    return candidates


def _llama3_divisors(
    wavelengths: np.ndarray, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
