"""Reading and writing safetensors folders: every dtype, slices, shards, and damaged files."""

import json
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from converters.errors import CheckpointError
from converters.hf import DTYPES, WEIGHT_INDEX, HFCheckpoint, read_safetensors_header, write_hf

CONFIG = {"architectures": ["TinyForCausalLM"], "rope_scaling": None, "eps": 1e-05, "名": "é"}


def arrays(count: int = 6, rows: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer.{i}.weight": rng.standard_normal((rows, 16), np.float32) for i in range(count)}


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A single-file checkpoint of `arrays()`."""
    return write_hf(tmp_path / "single", CONFIG, arrays().items())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of `arrays()` with two tensors per shard."""
    return write_hf(tmp_path / "sharded", CONFIG, arrays().items(), max_shard_bytes=2 * 32 * 16 * 4)


# ---- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_reads_back_bit_for_bit(tmp_path: Path, dtype: np.dtype) -> None:
    raw = np.random.default_rng(0).integers(0, 2, 6 * 5 * dtype.itemsize, np.uint8)
    tensor = raw.view(dtype).reshape(6, 5)
    checkpoint = HFCheckpoint(write_hf(tmp_path / "m", {}, [("t", tensor)]))
    assert checkpoint.headers["t"].shape == (6, 5)
    assert checkpoint.headers["t"].dtype == dtype
    read = checkpoint.read("t", (slice(1, 4), slice(2, 5)))
    assert read.dtype == dtype
    assert read.tobytes() == tensor[1:4, 2:5].tobytes()


def test_files_of_the_safetensors_library_read_the_same(tmp_path: Path) -> None:
    tensors = {**arrays(), "half": np.ones((3, 2), np.float16), "scalar": np.array(3.5, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor, strict=True)


def test_any_slice_equals_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.hf.READ_CHUNK_BYTES", 100)  # rows are larger, so all paths run
    tensor = np.arange(7 * 6 * 11, dtype=np.int16).reshape(7, 6, 11)
    checkpoint = HFCheckpoint(write_hf(tmp_path / "m", {}, [("t", tensor)]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        ends = [sorted(rng.integers(0, size + 1, 2)) for size in tensor.shape]
        index = tuple(slice(int(a), int(b)) for a, b in ends)[: rng.integers(0, 4)]
        read = checkpoint.read("t", index)
        np.testing.assert_array_equal(read, tensor[index], strict=True)
        assert read.flags.c_contiguous
        assert read.flags.writeable


@pytest.mark.parametrize("index", [(slice(None, None, 2),), (slice(0, 1),) * 3])
def test_steps_and_extra_axes_are_refused(folder: Path, index: tuple[slice, ...]) -> None:
    with pytest.raises(IndexError, match=r"layer\.0\.weight"):
        HFCheckpoint(folder).read("layer.0.weight", index)


def test_a_slice_costs_its_own_memory_only(tmp_path: Path) -> None:
    tensor = np.zeros((4096, 4096), ml_dtypes.bfloat16)  # 32 MiB
    checkpoint = HFCheckpoint(write_hf(tmp_path / "m", {}, [("t", tensor)]))
    tracemalloc.start()
    try:
        checkpoint.read("t", (slice(64, 128),))
        checkpoint.read("t", (slice(0, 256), slice(0, 64)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_a_checkpoint_without_an_index_joins_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": np.ones(1)}, tmp_path / "two.safetensors")
    assert HFCheckpoint(tmp_path).headers.keys() == {"a", "b"}
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in both .*one.* and .*two"):
        HFCheckpoint(tmp_path)


# ---- writing ---------------------------------------------------------------------------------


def test_a_single_file_checkpoint_round_trips(folder: Path) -> None:
    assert tree(folder) == {"config.json", "model.safetensors"}
    checkpoint = HFCheckpoint(folder)
    assert list(checkpoint.config.items()) == list(CONFIG.items())
    assert checkpoint.generation_config == {}
    assert checkpoint.tokenizer_dir is None
    assert list(checkpoint.headers) == list(arrays())
    for name, tensor in arrays().items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor)


def test_shards_and_index_are_what_other_readers_expect(sharded: Path) -> None:
    names = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert tree(sharded) == {"config.json", WEIGHT_INDEX, *names}
    index = json.loads((sharded / WEIGHT_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in arrays().values())
    for name, tensor in arrays().items():
        with safetensors.safe_open(sharded / index["weight_map"][name], "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
    checkpoint = HFCheckpoint(sharded)
    for name, tensor in arrays().items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor)


def test_a_tensor_larger_than_a_shard_is_alone(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(10), "b": np.zeros(100), "c": np.zeros(10)}
    path = write_hf(tmp_path / "m", {}, tensors.items(), max_shard_bytes=200)
    assert len(list(path.glob("*.safetensors"))) == 3


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def produce() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for i in range(20):
            tensor = np.zeros(1000, np.uint8)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{i}", tensor
            del tensor

    write_hf(tmp_path / "m", {}, produce(), max_shard_bytes=4000)
    assert most <= 6  # a shard of four, the next tensor, the one just handed over


def test_generation_config_and_tokenizer_travel_along(
    tmp_path: Path, make_byte_tokenizer: Callable[..., Path]
) -> None:
    source = make_byte_tokenizer(tmp_path / "tokenizer")
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "unrelated.txt").write_text("no")
    path = write_hf(
        tmp_path / "m", CONFIG, arrays().items(),
        generation_config={"eos_token_id": [1, 2]}, tokenizer_dir=source,
    )  # fmt: skip
    checkpoint = HFCheckpoint(path)
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.tokenizer_dir == path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (path / name).read_bytes() == (source / name).read_bytes()
    assert not (path / "unrelated.txt").exists()


def test_progress_counts_bytes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    total = sum(t.nbytes for t in arrays().values())
    write_hf(
        tmp_path / "m", {}, arrays().items(),
        total_bytes=total, progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [done for _, done, _ in calls] == [total * (i + 1) // 6 for i in range(6)]
    assert calls[-1][1:] == (total, total)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def produce() -> Iterator[tuple[str, np.ndarray]]:
        yield from arrays().items()
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_hf(tmp_path / "m", CONFIG, produce(), max_shard_bytes=1)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", np.zeros(1)), ("a", np.zeros(1))], "a is written twice"),
        ([("a", np.zeros(1, np.complex128))], "a is complex128"),
    ],
)
def test_unwritable_tensors_are_refused(
    tmp_path: Path, tensors: list[tuple[str, np.ndarray]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_hf(tmp_path / "m", CONFIG, tensors)
    assert tree(tmp_path) == set()


def test_a_full_destination_is_replaced_only_when_asked(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        write_hf(folder, {}, [("new", np.zeros(1))])
    assert (folder / "model.safetensors").read_bytes() == before
    write_hf(folder, {}, [("new", np.zeros(1))], overwrite=True)
    assert HFCheckpoint(folder).headers.keys() == {"new"}
    assert tree(folder.parent) == {
        "single", "single/config.json", "single/model.safetensors"
    }  # fmt: skip


def test_overwriting_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        write_hf(tmp_path, {}, [("a", np.zeros(1))], overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        write_hf(tmp_path / "thesis.txt", {}, [("a", np.zeros(1))], overwrite=True)
    assert tree(tmp_path) == {"thesis.txt"}


def test_an_empty_destination_is_used(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_hf(tmp_path / "m", {}, [("a", np.zeros(1))])
    assert HFCheckpoint(tmp_path / "m").headers.keys() == {"a"}


# ---- damaged files ---------------------------------------------------------------------------


def test_any_cut_is_one_clear_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 4, 8, 100, 400, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short.*again"):
            HFCheckpoint(folder)
    file.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt.*again"):
        HFCheckpoint(folder)


def test_flipped_header_bytes_never_crash(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(0, header_bytes + 8)] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            read_safetensors_header(file)
        except CheckpointError as error:
            assert str(file) in str(error)


def damaged_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(data_offsets=[4, 12]), "b begins at byte"),
        (lambda h: h["b"].update(shape=[3]), r"b of shape \(3,\) and dtype F32 has 8 bytes"),
        (lambda h: h["b"].update(shape=[-2]), "damaged header"),
        (lambda h: h["b"].update(dtype="F4"), "b has dtype F4.*Readable"),
        (lambda h: h["b"].pop("dtype"), "damaged header"),
        (lambda h: h.update(b=3), "damaged header"),
        (lambda h: h.pop("b"), "describes"),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged_header(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(file)
    assert str(file) in str(caught.value)


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        HFCheckpoint(folder)


def test_missing_shards_are_all_named(sharded: Path) -> None:
    for part in (1, 3):
        (sharded / f"model-0000{part}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 of 3 shards.*00001-of.*00003-of.*again"):
        HFCheckpoint(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / WEIGHT_INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (sharded / WEIGHT_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors.*ghost \(model-00001"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", '{"weight_map": {}}'])
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / WEIGHT_INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        HFCheckpoint(sharded)


def test_a_file_that_shrinks_while_open_is_reported(folder: Path) -> None:
    checkpoint = HFCheckpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read layer\.5\.weight"):
        checkpoint.read("layer.5.weight")
