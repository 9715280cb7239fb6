"""GGUF files as HF checkpoints: parsing, dequantizing, names, row order, configs, errors."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from converters.demo import demo_model_path
from converters.errors import CheckpointError
from converters.gguf import GGUFCheckpoint
from converters.gguf_file import can_dequantize, dequantize, read_gguf

from .conftest import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB

GGML = gguf.GGMLQuantizationType
QUANTIZED = [t for t in GGML if can_dequantize(t) and t.name not in ("F32", "F16", "F64")]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: the two halves of a head's rows become pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def llama(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> Callable[..., Path]:
    """Return a function that writes a tiny llama with changed metadata or more tensors."""

    def write(
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        untied: bool = True,
        **options: Any,
    ) -> Path:
        return write_gguf(
            "llama",
            decoder_metadata("llama") | (metadata or {}),
            decoder_tensors(llama_layer, untied) | (tensors or {}),
            **options,
        )

    return write


# ---- the file --------------------------------------------------------------------------------


def test_metadata_and_tensors_equal_the_librarys(llama: Callable[..., Path]) -> None:
    extra = {
        "general.alignment": 64,
        "x.flag": True,
        "x.ints": [1, -2, 3],
        "x.floats": [0.5, 1.5],
        "x.strings": ["a", "", "é"],
        "x.text": "日本語",
    }
    path = llama(extra)
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert file.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert mine.offset == tensor.data_offset
        rows = mine.read_rows(0, mine.num_rows)
        np.testing.assert_array_equal(rows.reshape(mine.shape), tensor.data)


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_dequantizing_equals_the_librarys(type: GGML) -> None:
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[type]
    blocks = 2 * (1 << 14) // block_values + 3  # two full groups and a rest
    raw = np.random.default_rng(0).integers(0, 256, blocks * block_bytes, np.uint8)
    with np.errstate(all="ignore"):
        mine = dequantize(raw, type)
        theirs = gguf.dequantize(raw.reshape(blocks, block_bytes), type)
    assert mine.dtype == np.float32
    np.testing.assert_array_equal(mine, theirs.reshape(-1))


def test_a_split_file_is_read_whole(llama: Callable[..., Path]) -> None:
    whole = GGUFCheckpoint(llama())
    tensors = {
        name: t.read_rows(0, t.num_rows) for name, t in read_gguf(whole.path).tensors.items()
    }
    metadata = dict(read_gguf(whole.path).metadata)
    del metadata["general.architecture"]
    folder = whole.path.parent
    for part in range(3):
        writer = gguf.GGUFWriter(folder / f"m-0000{part + 1}-of-00003.gguf", "llama")
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", part)
        if part == 0:
            for key, value in metadata.items():
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        for name, rows in list(tensors.items())[part::3]:
            writer.add_tensor(name, rows[0] if len(rows) == 1 else rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    joined = GGUFCheckpoint(folder / "m-00001-of-00003.gguf")
    assert joined.headers == whole.headers
    for name in whole.headers:
        np.testing.assert_array_equal(joined.read(name), whole.read(name))
    (folder / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf cannot be read"):
        GGUFCheckpoint(folder / "m-00001-of-00003.gguf")
    with pytest.raises(CheckpointError, match="Give the path of the first"):
        GGUFCheckpoint(folder / "m-00002-of-00003.gguf")


def test_any_cut_is_one_clear_error(llama: Callable[..., Path]) -> None:
    path = llama({"tokenizer.ggml.tokens": ["token"] * 50})
    content = path.read_bytes()
    for size in [0, 3, 4, 8, 23, *range(24, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*again"):
            GGUFCheckpoint(path)


def test_flipped_metadata_bytes_never_crash(llama: Callable[..., Path]) -> None:
    path = llama({"tokenizer.ggml.tokens": ["token"] * 5})
    content = path.read_bytes()
    metadata_bytes = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.integers(0, metadata_bytes)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except CheckpointError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF\x01\x00\x00\x00" + bytes(64), "GGUF version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(64), "big-endian"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(tmp_path / "model.gguf")


def test_a_quantization_that_cannot_be_undone_names_tensor_and_type(
    llama: Callable[..., Path],
) -> None:
    name = "blk.1.ffn_up.weight"
    blocks = np.zeros((FFN, gguf.GGML_QUANT_SIZES[GGML.Q8_1][1] * HIDDEN // 32), np.uint8)
    path = llama(tensors={name: blocks}, types={name: GGML.Q8_1})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight is stored as Q8_1"):
        GGUFCheckpoint(path)


# ---- names, row order, slices ----------------------------------------------------------------


def test_llama_rows_come_back_in_hf_order(
    llama: Callable[..., Path],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    hf = decoder_tensors(llama_layer)
    biases = {
        f"blk.{i}.attn_{p}.bias": hf[f"blk.{i}.attn_{p}.weight"][:, 0]
        for i in (0, 1)
        for p in "qkv"
    }
    hf |= biases
    stored = dict(hf)
    for name in hf:
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if part in name:
                stored[name] = interleave(hf[name], heads)
    checkpoint = GGUFCheckpoint(llama(tensors=stored))
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    modules = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(LAYERS):
        for module, name in modules.items():
            for kind in ("weight", "bias"):
                if f"blk.{layer}.{name}.{kind}" in hf:
                    expected[f"model.layers.{layer}.{module}.{kind}"] = f"blk.{layer}.{name}.{kind}"
    assert checkpoint.headers.keys() == expected.keys()
    assert checkpoint.config["attention_bias"]
    for name, source in expected.items():
        assert checkpoint.headers[name].shape == hf[source].shape
        np.testing.assert_array_equal(checkpoint.read(name), hf[source])


@pytest.mark.parametrize("type", [GGML.F16, GGML.BF16, GGML.Q8_0, GGML.Q4_0])
def test_any_slice_equals_the_whole_tensors(
    llama: Callable[..., Path],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    type: GGML,
) -> None:
    tensors = decoder_tensors(llama_layer)
    matrices = {
        name: gguf.quantize(array, type) for name, array in tensors.items() if array.ndim == 2
    }
    checkpoint = GGUFCheckpoint(llama(tensors=matrices, types=dict.fromkeys(matrices, type)))
    names = [f"model.layers.1.{m}.weight" for m in ("self_attn.q_proj", "mlp.down_proj")]
    whole = {name: checkpoint.read(name) for name in names}
    np.testing.assert_array_equal(
        whole[names[1]], gguf.dequantize(matrices["blk.1.ffn_down.weight"], type)
    )
    monkeypatch.setattr("converters.gguf.READ_CHUNK_VALUES", 5 * HIDDEN)
    rng = np.random.default_rng(0)
    for _ in range(100):
        for name, values in whole.items():
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in values.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)[: rng.integers(0, 3)]
            read = checkpoint.read(name, index)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, values[index])


def test_a_row_slice_reads_its_rows_only(
    llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = GGUFCheckpoint(llama())
    seen: list[int] = []
    monkeypatch.setattr(
        "converters.gguf_file.dequantize",
        lambda raw, type: seen.append(len(raw)) or dequantize(raw, type),
    )
    checkpoint.read("model.embed_tokens.weight", (slice(3, 5),))
    checkpoint.read("model.layers.0.self_attn.q_proj.weight", (slice(HEAD_DIM, 2 * HEAD_DIM),))
    assert seen == [2 * HIDDEN * 4, HEAD_DIM * HIDDEN * 4]


def test_a_missing_output_matrix_means_tied_embeddings(llama: Callable[..., Path]) -> None:
    assert not GGUFCheckpoint(llama()).config["tie_word_embeddings"]
    tied = GGUFCheckpoint(llama(untied=False))
    assert tied.config["tie_word_embeddings"]
    assert "lm_head.weight" not in tied.headers


def test_gemma_norms_lose_the_one_that_was_added(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    layer = llama_layer | {
        "attn_q_norm.weight": (HEAD_DIM,),
        "attn_k_norm.weight": (HEAD_DIM,),
        "post_attention_norm.weight": (HIDDEN,),
        "post_ffw_norm.weight": (HIDDEN,),
    }
    metadata = decoder_metadata(
        "gemma3", attention__key_length=HEAD_DIM, attention__sliding_window=32
    )
    stored = decoder_tensors(layer, untied=False)
    checkpoint = GGUFCheckpoint(write_gguf("gemma3", metadata, stored))
    norms = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    for module, name in norms.items():
        read = checkpoint.read(f"model.layers.1.{module}.weight")
        np.testing.assert_array_equal(read, stored[f"blk.1.{name}.weight"] - 1)
    np.testing.assert_array_equal(
        checkpoint.read("model.norm.weight", (slice(3, 9),)), stored["output_norm.weight"][3:9] - 1
    )
    np.testing.assert_array_equal(  # no rotary permutation here
        checkpoint.read("model.layers.0.self_attn.q_proj.weight"), stored["blk.0.attn_q.weight"]
    )
    config = checkpoint.config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["model_type"] == "gemma3_text"
    assert config["head_dim"] == config["query_pre_attn_scalar"] == HEAD_DIM
    assert config["sliding_window"] == 32
    assert config["sliding_window_pattern"] == 6
    assert config["rope_local_base_freq"] == 10000.0


# ---- configs ---------------------------------------------------------------------------------


def test_llama_config_is_hfs(llama: Callable[..., Path]) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    checkpoint = GGUFCheckpoint(llama(ids))
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_every_end_token_is_in_the_generation_config(llama: Callable[..., Path]) -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|endoftext|>", "b", "<|end|>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1, 1],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 2,
    }
    checkpoint = GGUFCheckpoint(llama(metadata))
    assert checkpoint.generation_config["eos_token_id"] == [3, 2, 1]
    assert checkpoint.config["eos_token_id"] == 3


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_is_hfs(
    llama: Callable[..., Path], metadata: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    path = llama({f"llama.{key}": value for key, value in metadata.items()})
    assert GGUFCheckpoint(path).config["rope_scaling"] == expected


def llama3_divisors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """Llama 3.1's published formula, frequency by frequency."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    "scaling",
    [
        (500000.0, 8.0, 1.0, 4.0, 8192),
        (500000.0, 32.0, 1.0, 4.0, 8192),
        (10000.0, 8.0, 1.0, 4.0, 32),
        (500.0, 4.0, 1.0, 6.0, 128),
        (500000.0, 8.0, 1.0, 4.0, 20),
        (500000.0, 8.0, 1.0, 4.0, 32),
    ],
)
def test_llama3_scaling_is_recovered_from_its_divisors(
    llama: Callable[..., Path], scaling: tuple[float, float, float, float, int]
) -> None:
    theta, factor, low, high, original = scaling
    divisors = llama3_divisors(HEAD_DIM, theta, factor, low, high, original)
    checkpoint = GGUFCheckpoint(
        llama({"llama.rope.freq_base": theta}, {"rope_freqs.weight": divisors})
    )
    found = checkpoint.config["rope_scaling"]
    assert found["rope_type"] == "llama3"
    assert found["factor"] == factor
    again = llama3_divisors(
        HEAD_DIM, theta, factor,
        found["low_freq_factor"], found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )  # fmt: skip
    np.testing.assert_allclose(again, divisors, rtol=1e-4)
    if original == 8192:
        assert (found["high_freq_factor"], found["original_max_position_embeddings"]) == (4.0, 8192)
    assert not any("rope_freqs" in name for name in checkpoint.headers)


def test_divisors_of_one_mean_no_scaling(llama: Callable[..., Path]) -> None:
    path = llama(tensors={"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)})
    assert GGUFCheckpoint(path).config["rope_scaling"] is None


def test_other_divisors_are_refused(llama: Callable[..., Path]) -> None:
    divisors = np.array([1, 5, 2, 7, 3, 3, 9, 4], np.float32)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(llama(tensors={"rope_freqs.weight": divisors}))


def test_a_windowed_llama_is_a_mistral(llama: Callable[..., Path]) -> None:
    config = GGUFCheckpoint(llama({"llama.attention.sliding_window": 64})).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 64


def test_a_head_dim_of_its_own_is_kept(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    layer = llama_layer | {
        "attn_q.weight": (HEADS * 32, HIDDEN),
        "attn_k.weight": (KV_HEADS * 32, HIDDEN),
        "attn_v.weight": (KV_HEADS * 32, HIDDEN),
        "attn_output.weight": (HIDDEN, HEADS * 32),
    }
    metadata = decoder_metadata("llama", attention__key_length=32, attention__value_length=32)
    tensors = decoder_tensors(layer)
    expected = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = interleave(expected, HEADS)
    checkpoint = GGUFCheckpoint(write_gguf("llama", metadata, tensors))
    assert checkpoint.config["head_dim"] == 32
    np.testing.assert_array_equal(
        checkpoint.read("model.layers.0.self_attn.q_proj.weight"), expected
    )


def test_qwen2_has_biases_and_plain_row_order(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    layer = llama_layer | {
        f"attn_{part}.bias": llama_layer[f"attn_{part}.weight"][:1] for part in "qkv"
    }
    tensors = decoder_tensors(layer)
    checkpoint = GGUFCheckpoint(write_gguf("qwen2", decoder_metadata("qwen2"), tensors))
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert checkpoint.config["use_sliding_window"] is False
    for kind in ("weight", "bias"):
        np.testing.assert_array_equal(
            checkpoint.read(f"model.layers.1.self_attn.q_proj.{kind}"),
            tensors[f"blk.1.attn_q.{kind}"],
        )


def test_phi3_factors_become_longrope(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
) -> None:
    layer = {
        "attn_norm.weight": (HIDDEN,),
        "attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_up.weight": (2 * FFN, HIDDEN),
        "ffn_down.weight": (HIDDEN, FFN),
    }
    tensors = decoder_tensors(layer)
    tensors["rope_factors_short.weight"] = np.array([1.05, 1.1, 1.2, 1.5, 1.7, 2], np.float32)
    tensors["rope_factors_long.weight"] = np.array([1.1, 2, 3, 4.5, 6, 11], np.float32)
    metadata = decoder_metadata(
        "phi3",
        rope__dimension_count=12,
        rope__scaling__original_context_length=64,
        rope__scaling__attn_factor=1.19,
        attention__sliding_window=0,
    )
    checkpoint = GGUFCheckpoint(write_gguf("phi3", metadata, tensors))
    config = checkpoint.config
    assert config["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.05, 1.1, 1.2, 1.5, 1.7, 2.0],
        "long_factor": [1.1, 2.0, 3.0, 4.5, 6.0, 11.0],
    }
    assert config["original_max_position_embeddings"] == 64
    assert config["partial_rotary_factor"] == 0.75
    assert config["sliding_window"] is None
    assert checkpoint.headers.keys() == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(f"model.layers.{layer}.{module}.weight" for layer in range(LAYERS) for module in (
            "input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj",
            "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    }  # fmt: skip
    np.testing.assert_array_equal(
        checkpoint.read("model.layers.1.mlp.gate_up_proj.weight"), tensors["blk.1.ffn_up.weight"]
    )


# ---- refusals --------------------------------------------------------------------------------


def test_an_unknown_architecture_lists_the_known_ones(
    write_gguf: Callable[..., Path],
) -> None:
    path = write_gguf("mamba", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(CheckpointError, match="'mamba'; supported: llama, qwen2, gemma3, phi3"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.logit_scale": 0.5}, r"not understood: llama\.logit_scale"),
        ({"llama.feed_forward_length": [96, 64]}, r"llama\.feed_forward_length differs per layer"),
        ({"llama.rope.scaling.type": "magic", "llama.rope.scaling.factor": 2.0}, "'magic'"),
    ],
)
def test_metadata_that_would_be_guessed_about_is_refused(
    llama: Callable[..., Path], metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(llama(metadata))


def test_missing_metadata_is_named(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    metadata = decoder_metadata("llama")
    del metadata["llama.embedding_length"]
    with pytest.raises(CheckpointError, match=r"lacks the metadata key llama\.embedding_length"):
        GGUFCheckpoint(write_gguf("llama", metadata, decoder_tensors(llama_layer)))


def test_tensors_without_a_place_are_refused(llama: Callable[..., Path]) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(CheckpointError, match=r"1 tensors .*blk\.0\.attn_sinks\.weight"):
        GGUFCheckpoint(llama(tensors=extra))


def test_a_file_without_a_language_model_is_refused(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf("llama", {}, {"v.blk.0.ln1.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match="not a language model"):
        GGUFCheckpoint(path)


# ---- real models -----------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["demo", "gemma-270m"])
def test_real_weights_and_config_equal_what_transformers_makes_of_them(name: str) -> None:
    path = demo_model_path(name)
    checkpoint = GGUFCheckpoint(path)
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    mine = type(theirs).from_dict(dict(checkpoint.config)).to_dict()
    named_by_one = {"architectures", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path",
                    "unk_token_id", "sliding_window_pattern"}  # fmt: skip
    for key, value in theirs.to_dict().items():
        if key == "rms_norm_eps":
            assert np.float32(mine[key]) == np.float32(value)
        elif key not in named_by_one:
            assert mine[key] == value, key
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert checkpoint.headers.keys() == state.keys()
    for tensor in checkpoint.headers:
        np.testing.assert_array_equal(checkpoint.read(tensor), state.pop(tensor).numpy(), tensor)
