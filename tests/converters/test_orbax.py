"""Orbax folders: what is in them, slices, what plain Orbax makes of them, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.errors import CheckpointError
from converters.lazy import LazyTensor, boxes
from converters.orbax import MANIFEST, PARAMS, OrbaxCheckpoint, chunk_shape, nested, write_orbax

TENSORS = {
    "decoder.embed.weight": np.arange(37 * 11, dtype=np.float32).reshape(37, 11),
    "decoder.layers.0.ffn.up_proj.weight": np.ones((6, 4), ml_dtypes.bfloat16),
    "decoder.layers.0.ffn.up_proj.bias": np.zeros(6, np.float16),
    "decoder.layers.10.experts": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
    "scalar": np.float32(2.5).reshape(()),
}


def lazy(tensor: np.ndarray) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, lambda index: tensor[index])


def write(folder: Path, tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    return write_orbax(
        folder,
        {"architectures": ["TinyForCausalLM"]},
        {name: lazy(tensor) for name, tensor in tensors.items()},
        source_names=["one", "two"],
        max_shard_bytes=1000,
        generation_config={"eos_token_id": 2},
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of `TENSORS`, in many small chunks."""
    monkeypatch.setattr("converters.orbax.CHUNK_BYTES", 100)
    monkeypatch.setattr("converters.lazy.BLOCK_BYTES", 300)
    return write(tmp_path / "orbax")


def test_everything_reads_back(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, OrbaxCheckpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.canonical
    assert checkpoint.config == {"architectures": ["TinyForCausalLM"]}
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.tokenizer_dir is None
    assert checkpoint.source_names == ("one", "two")
    assert checkpoint.max_shard_bytes == 1000
    assert checkpoint.headers.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert checkpoint.headers[name].dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes()
        assert read.flags.writeable
        assert read.flags.c_contiguous


def test_any_slice_equals_numpys(folder: Path) -> None:
    checkpoint = OrbaxCheckpoint(folder)
    rng = np.random.default_rng(0)
    for name in ("decoder.embed.weight", "decoder.layers.10.experts"):
        for _ in range(50):
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in TENSORS[name].shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)[: rng.integers(0, 4)]
            read = checkpoint.read(name, index)
            np.testing.assert_array_equal(read, TENSORS[name][index], strict=True)
    with pytest.raises(KeyError):
        checkpoint.read("no.such.tensor")


def test_a_slice_reads_only_its_chunks(folder: Path) -> None:
    chunks = sorted((folder / PARAMS / "decoder.embed.weight").glob("[0-9]*.0"))
    assert len(chunks) > 4
    for chunk in chunks[1:]:
        chunk.write_bytes(b"")
    opened = OrbaxCheckpoint.__new__(OrbaxCheckpoint)  # as if the files broke after opening
    opened.__dict__.update(OrbaxCheckpoint(write(folder.parent / "whole")).__dict__, path=folder)
    row = opened.read("decoder.embed.weight", (slice(0, 1), slice(0, 3)))
    np.testing.assert_array_equal(row, TENSORS["decoder.embed.weight"][:1, :3])
    with pytest.raises(CheckpointError, match=r"decoder\.embed\.weight cannot be read.*damaged"):
        opened.read("decoder.embed.weight")


def test_plain_orbax_restores_it(folder: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        standard = checkpointer.restore((folder / PARAMS).absolute())
    with ocp.PyTreeCheckpointer() as checkpointer:
        pytree = checkpointer.restore((folder / PARAMS).absolute())
    for tree in (standard, pytree):
        assert tree.keys() == {"decoder", "scalar"}
        up_proj = tree["decoder"]["layers"]["0"]["ffn"]["up_proj"]
        assert up_proj["weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tree["decoder"]["embed"]["weight"],
                                      TENSORS["decoder.embed.weight"])  # fmt: skip
        np.testing.assert_array_equal(tree["decoder"]["layers"]["10"]["experts"],
                                      TENSORS["decoder.layers.10.experts"])  # fmt: skip


def test_names_with_dots_become_a_tree() -> None:
    assert nested({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (5,), (4096, 4096), (262_144, 5376), (128, 9, 70_001)]
)
def test_chunks_are_small_and_blocks_are_made_of_whole_ones(shape: tuple[int, ...]) -> None:
    chunk = chunk_shape(shape, 4)
    assert np.prod(chunk) * 4 <= 1 << 24
    covered = 0
    for box in boxes(shape, 4, 1 << 26, chunk):
        sizes = [part.stop - part.start for part in box]
        assert np.prod(sizes) * 4 <= 1 << 26
        covered += int(np.prod(sizes))
        for part, size, length in zip(box, shape, chunk, strict=True):
            assert part.start % length == 0
            assert part.stop % length == 0 or part.stop == size
    assert covered == np.prod(shape)


def test_boxes_without_chunks_are_contiguous() -> None:
    tensor = np.arange(3 * 5 * 7, dtype=np.int16).reshape(3, 5, 7)
    for max_bytes in (1, 10, 50, 71, 1000):
        pieces = [tensor[index].tobytes() for index in boxes(tensor.shape, 2, max_bytes)]
        assert b"".join(pieces) == tensor.tobytes()
        assert max(map(len, pieces)) <= max(2, max_bytes)


def damage_chunk(folder: Path) -> None:
    file = next((folder / PARAMS / "decoder.embed.weight").glob("0.0"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_by_removal(folder: Path) -> None:
    (folder / PARAMS / "scalar" / ".zarray").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-10])


def drop_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def drop_key(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["tensors"]["scalar"]["dtype"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def raise_version(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_chunk, r"embed\.weight/0\.0 has \d+ bytes of \d+\. Convert or copy it again"),
        (damage_by_removal, r"scalar/\.zarray is missing"),
        (damage_manifest, r"jaxserve\.json is not valid JSON"),
        (drop_manifest, r"without jaxserve\.json.*jaxserve convert SRC DST --to orbax"),
        (drop_key, r"jaxserve\.json is damaged"),
        (raise_version, r"format version 99; this program reads 1"),
        (drop_config, r"config\.json cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_an_orbax_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other", {"a": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"written by another program"):
        open_checkpoint(tmp_path / "other")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(index: tuple[slice, ...]) -> np.ndarray:
        raise RuntimeError("the source broke")

    tensors = {"a": lazy(np.ones(3)), "b": LazyTensor((3,), np.dtype(np.float32), broken)}
    with pytest.raises(RuntimeError, match="the source broke"):
        write_orbax(tmp_path / "o", {}, tensors, source_names=[], max_shard_bytes=1)
    assert not list(tmp_path.iterdir())
