"""Conversions: bit equality there and back for every family, memory, and every way to fail."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from converters.hf import HFCheckpoint, write_hf
from converters.interface import Checkpoint
from jaxserve import cli
from model_defs.hf_config import UnsupportedConfig
from model_defs.registry import get_family, list_families
from model_defs.weights import WeightPlanError

from . import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    pytest.param(architecture, fields, id=f"{architecture}-{index}")
    for family in list_families()
    for architecture in family.architectures
    for index, fields in enumerate(family.tiny)
]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    """Compare two checkpoints: names in order, shapes, dtypes and every bit."""
    assert list(left.headers) == list(right.headers)
    for name in left.headers:
        a, b = left.read(name), right.read(name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name
    assert left.generation_config == right.generation_config


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded float32 Llama."""
    return tiny_llama.write(tmp_path / "source")


@pytest.fixture
def goals(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to convert into; whatever a test leaves there must have a plain name."""
    folder = tmp_path / "goals"
    folder.mkdir()
    yield folder
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- there and back --------------------------------------------------------------------------


def reference_class(architecture: str) -> Any:
    """Transformers' class of an architecture: of the same family, where it lacks the name."""
    names = (architecture, *get_family(architecture).architectures)
    return next(getattr(transformers, name) for name in names if hasattr(transformers, name))


def set_architecture(folder: Path, architecture: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [architecture]}))


@pytest.mark.parametrize(("architecture", "fields"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_comes_back_bit_for_bit(
    tmp_path: Path, architecture: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model_class = reference_class(architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**fields)).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    set_architecture(tmp_path / "hf", architecture)
    there = convert(tmp_path / "hf", tmp_path / "orbax", "orbax", verify=True)
    back = convert(tmp_path / "orbax", tmp_path / "back", "hf", verify=True)
    original = open_checkpoint(tmp_path / "hf")
    assert_same(original, open_checkpoint(tmp_path / "back"))
    assert open_checkpoint(tmp_path / "back").config == original.config
    assert (
        there.num_verified == there.num_tensors == len(open_checkpoint(tmp_path / "orbax").headers)
    )
    assert back.num_tensors == len(original.headers)
    assert there.dropped == back.dropped == ()
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1  # shards as before
    reloaded = model_class.from_pretrained(tmp_path / "back", dtype=dtype)
    for name, parameter in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], parameter), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_nan_infinity_and_negative_zero_survive(tmp_path: Path, dtype: Any) -> None:
    tiny_llama.write(tmp_path / "hf", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "orbax", "orbax", verify=True)
    convert(tmp_path / "orbax", tmp_path / "back", "hf", verify=True)
    assert_same(open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "back"))


def test_a_stored_tied_head_comes_back(tmp_path: Path) -> None:
    config = {**tiny_llama.CONFIG, "tie_word_embeddings": True}
    tensors = dict(tiny_llama.tensors())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path / "hf", config, tensors.items())
    done = convert(tmp_path / "hf", tmp_path / "orbax", "orbax", verify=True)
    assert done.num_tensors == len(tensors) - 1  # kept once
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    assert_same(open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "back"))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path, goals: Path) -> None:
    source = tiny_llama.write(tmp_path / "hf", {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight repeats.*tie_word_embeddings"):
        convert(source, goals / "orbax", "orbax")
    assert not list(goals.iterdir())


def test_buffers_are_left_out_and_named(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**dict(tiny_llama.tensors()), buffer: np.ones(2, np.float32)}
    write_hf(tmp_path / "hf", tiny_llama.CONFIG, tensors.items())
    assert convert(tmp_path / "hf", tmp_path / "orbax", "orbax").dropped == (buffer,)
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    assert open_checkpoint(tmp_path / "back").headers.keys() == tensors.keys() - {buffer}


def test_tokenizer_and_configs_travel(
    source: Path, tmp_path: Path, make_byte_tokenizer: Callable[..., Path]
) -> None:
    make_byte_tokenizer(source)
    convert(source, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "orbax" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
        assert json.loads((source / name).read_text()) == json.loads(
            (tmp_path / "back" / name).read_text()
        )
    assert open_checkpoint(tmp_path / "orbax").tokenizer_dir == tmp_path / "orbax"


def test_orbax_to_orbax_keeps_the_way_back(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "one", "orbax")
    convert(tmp_path / "one", tmp_path / "two", "orbax", verify=True)
    convert(tmp_path / "two", tmp_path / "back", "hf")
    assert_same(open_checkpoint(source), open_checkpoint(tmp_path / "back"))


# ---- other formats, dtypes, shards -----------------------------------------------------------


def test_gguf_becomes_hf_and_orbax(
    tmp_path: Path,
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> None:
    file = write_gguf("llama", decoder_metadata("llama"), decoder_tensors(llama_layer))
    keep = tmp_path / "cache"
    convert(file, tmp_path / "hf", "hf", verify=True, download_dir=keep)
    assert_same(open_checkpoint(file, download_dir=keep), open_checkpoint(tmp_path / "hf"))
    convert(file, tmp_path / "orbax", "orbax", dtype="bfloat16", verify=True, download_dir=keep)
    convert(tmp_path / "hf", tmp_path / "half", "hf", dtype="bfloat16")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    assert_same(open_checkpoint(tmp_path / "half"), open_checkpoint(tmp_path / "back"))
    assert open_checkpoint(tmp_path / "back").config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_dtype_rounds_as_torch_does(tmp_path: Path, to: str) -> None:
    tensors = dict(tiny_llama.tensors())
    write_hf(tmp_path / "hf", {**tiny_llama.CONFIG, "dtype": "float32"}, tensors.items())
    convert(tmp_path / "hf", tmp_path / "half", to, dtype="bfloat16", verify=True)
    if to == "orbax":
        convert(tmp_path / "half", tmp_path / "half-hf", "hf")
    half = open_checkpoint(tmp_path / ("half-hf" if to == "orbax" else "half"))
    assert half.config["dtype"] == half.config["torch_dtype"] == "bfloat16"
    for name, tensor in tensors.items():
        expected = torch.from_numpy(tensor).to(torch.bfloat16).view(torch.uint16).numpy()
        finite = ~np.isnan(tensor)
        np.testing.assert_array_equal(half.read(name).view(np.uint16)[finite], expected[finite])
        assert np.isnan(half.read(name)[~finite]).all()


def test_values_that_do_not_fit_are_refused(tmp_path: Path, goals: Path) -> None:
    tensors = dict(tiny_llama.tensors())
    tensors["model.norm.weight"][5] = 70_000
    write_hf(tmp_path / "hf", tiny_llama.CONFIG, tensors.items())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 values do not fit.*float16"):
        convert(tmp_path / "hf", goals / "half", "hf", dtype="float16")
    with pytest.raises(CheckpointError, match=r"decoder\.norm\.weight: 1 values do not fit"):
        convert(tmp_path / "hf", goals / "half", "orbax", dtype="float16")
    assert not list(goals.iterdir())


def test_shards_can_be_resized(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "one", "hf", max_shard_bytes=10**9, verify=True)
    assert "model.safetensors" in files_of(tmp_path / "one")
    convert(source, tmp_path / "many", "hf", max_shard_bytes=6_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > len(
        list(source.glob("*.safetensors"))
    )
    assert_same(open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many"))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_progress_ends_at_the_total(source: Path, tmp_path: Path, to: str) -> None:
    calls: list[tuple[str, int, int]] = []
    done = convert(
        source, tmp_path / to, to, verify=True, progress=lambda *call: calls.append(call)
    )
    for stage in ("writing", "verifying"):
        reached = [reached for what, reached, _ in calls if what == stage]
        assert reached == sorted(reached)
        assert reached[-1] == done.num_bytes
    assert {total for _, _, total in calls} == {done.num_bytes}


# ---- memory ----------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from converters.convert import convert
import orbax.checkpoint, jax
jax.devices()

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

before = peak_bytes()
convert(sys.argv[1], sys.argv[2], sys.argv[3], verify=True)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    changes = {
        "vocab_size": 31_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    source = tiny_llama.write(tmp_path / "hf", changes, max_shard_bytes=128 * 2**20)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert len(sizes) >= 4
    allowed = 1.3 * max(sizes) + 256 * 2**20
    assert sum(sizes) > 1.25 * allowed  # else the bound would say nothing
    try:
        for src, dst, to in ((source, "orbax", "orbax"), (tmp_path / "orbax", "back", "hf")):
            run = [sys.executable, "-c", MEASURE, str(src), str(tmp_path / dst), to]
            done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert int(done.stdout) < allowed
    finally:  # two gigabytes: not for pytest to keep
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)


# ---- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_truncated_source_writes_nothing(source: Path, goals: Path, to: str) -> None:
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-\d+\.safetensors is cut short"):
        convert(source, goals / "out", to)
    assert not list(goals.iterdir())


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_source_that_breaks_on_the_way_writes_nothing(
    source: Path, goals: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HFCheckpoint.read

    def failing(self: HFCheckpoint, name: str, index: Any = None) -> np.ndarray:
        if name == "model.layers.2.self_attn.o_proj.weight":
            raise CheckpointError("the disk failed")
        return read(self, name, index)

    monkeypatch.setattr(HFCheckpoint, "read", failing)
    with pytest.raises(CheckpointError, match="the disk failed"):
        convert(source, goals / "out", to)
    assert not list(goals.iterdir())


@pytest.mark.parametrize(
    ("to", "writer"), [("orbax", "converters.orbax._write_array"), ("hf", "converters.hf.boxes")]
)
def test_a_full_disk_leaves_nothing(
    source: Path, goals: Path, to: str, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(CheckpointError, match=r"No space left.*nothing was left.*GB are needed"):
        convert(source, goals / "out", to)
    assert not list(goals.iterdir())


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_disk_that_refuses_large_files_leaves_nothing(source: Path, goals: Path, to: str) -> None:
    """The operating system itself refuses, so that the libraries' own errors are met."""
    code = (
        "import resource, sys, converters.convert as c\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    c.convert(*sys.argv[1:])\n"
        "except c.CheckpointError as error:\n    print(error)"
    )
    run = [sys.executable, "-c", code, str(source), str(goals / "out"), to]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert not list(goals.iterdir())


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_an_existing_destination_is_kept(source: Path, goals: Path, to: str) -> None:
    out = goals / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"):
        convert(source, out, to)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        convert(source, out, to, overwrite=True)
    assert files_of(out) == {"precious.txt"}


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_checkpoint_can_be_replaced(source: Path, tmp_path: Path, to: str) -> None:
    tiny_llama.write(tmp_path / "out", {"num_hidden_layers": 1})
    convert(source, tmp_path / "out", to, overwrite=True, verify=True)
    if to == "hf":
        assert_same(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    else:
        assert open_checkpoint(tmp_path / "out").canonical
        assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_failed_verification_leaves_nothing(
    source: Path, goals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HFCheckpoint.read

    def unstable(self: HFCheckpoint, name: str, index: Any = None) -> np.ndarray:
        block = read(self, name, index)
        if name == "model.norm.weight" and self.path != source:
            block.view(np.uint8)[-1] ^= 1
        return block

    monkeypatch.setattr(HFCheckpoint, "read", unstable)
    with pytest.raises(CheckpointError, match=r"verification failed: 1 of 30.*model\.norm\.weight"):
        convert(source, goals / "out", "hf", verify=True)
    assert not list(goals.iterdir())


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_source_and_destination_must_be_apart(source: Path, where: str) -> None:
    before = files_of(source)
    with pytest.raises(CheckpointError, match="are not apart"):
        convert(source, source / where, "hf", overwrite=True)
    assert files_of(source) == before


def test_unknown_formats_and_dtypes_are_refused(source: Path, goals: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--to gguf is not a format.*orbax, hf"):
        convert(source, goals / "out", "gguf")
    with pytest.raises(CheckpointError, match=r"--dtype int8 is not known.*float32, bfloat16"):
        convert(source, goals / "out", "hf", dtype="int8")
    with pytest.raises(CheckpointError, match="--max-shard-bytes is 0"):
        convert(source, goals / "out", "hf", max_shard_bytes=0)
    assert not list(goals.iterdir())


def test_orbax_needs_a_known_and_fitting_model(tmp_path: Path, goals: Path) -> None:
    unknown = tiny_llama.write(tmp_path / "unknown", {"architectures": ["NoSuchForCausalLM"]})
    with pytest.raises(UnsupportedConfig, match="NoSuchForCausalLM"):
        convert(unknown, goals / "out", "orbax")
    misfit = tmp_path / "misfit"
    write_hf(misfit, tiny_llama.CONFIG, list(tiny_llama.tensors())[:-1])
    with pytest.raises(WeightPlanError, match=r"model\.norm\.weight"):
        convert(misfit, goals / "out", "orbax")
    assert not list(goals.iterdir())
    convert(unknown, goals / "out", "hf", verify=True)  # the same tensors: any model will do


# ---- the command -----------------------------------------------------------------------------


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", str(source), str(out), "--to", "orbax", "--verify"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 30 tensors, 0.000 GB, every one verified (")
    assert "writing: 0.000 of 0.000 GB" in printed.err
    assert cli.main(["convert", str(source), str(out), "--to", "orbax"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_command_refuses_an_unknown_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "a", "b", "--to", "gguf"])
    assert caught.value.code == 2
    assert "--to" in capsys.readouterr().err


@pytest.mark.real
def test_the_demo_model_there_and_back(demo_model: Path, tmp_path: Path) -> None:
    convert(demo_model, tmp_path / "orbax", "orbax", dtype="bfloat16", verify=True)
    convert(tmp_path / "orbax", tmp_path / "hf", "hf", verify=True)
    written, original = open_checkpoint(tmp_path / "hf"), open_checkpoint(demo_model)
    assert list(written.headers) == list(original.headers)
    name = "model.layers.7.self_attn.k_proj.weight"
    expected = original.read(name).astype(ml_dtypes.bfloat16)
    assert written.read(name).tobytes() == expected.tobytes()
    assert written.tokenizer_dir is not None
