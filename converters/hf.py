"""Read and write checkpoints in Hugging Face's layout: config.json and *.safetensors.

Headers are parsed here, so that opening a checkpoint reads a few kilobytes and a slice costs only
its own bytes; no file is mapped or loaded whole. No code from a checkpoint is ever run.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.interface import Index, Progress, TensorHeader, slice_bounds
from converters.lazy import LazyTensor, boxes
from converters.write_aside import folder_written_aside

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""safetensors dtype name -> numpy dtype."""

DTYPE_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
)
"""Files that travel with the weights when a checkpoint is written."""

WEIGHT_INDEX = "model.safetensors.index.json"
PYTORCH_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
READ_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `num_bytes` at `offset` from the start of `file`."""

    header: TensorHeader
    file: Path
    offset: int


class HFCheckpoint:
    """A local folder with config.json and safetensors, single or sharded with an index.

    Raises CheckpointError at once for a missing or damaged file; the bytes of tensors are read by
    `read` only.
    """

    canonical = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            read_json(generation) if generation.exists() else {}
        )
        self._stored = _read_stored(self.path)
        self.headers: Mapping[str, TensorHeader] = {
            name: stored.header for name, stored in self._stored.items()
        }

    @property
    def tokenizer_dir(self) -> Path | None:
        """This folder when it holds a tokenizer, else None."""
        return self.path if has_tokenizer(self.path) else None

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read one tensor, or the part that `index` names, from disk.

        Raises KeyError for a name not in `headers` and CheckpointError when the file was cut or
        removed since it was opened.
        """
        stored = self._stored[name]
        header = stored.header
        bounds = slice_bounds(name, header.shape, index)
        out = np.empty([stop - start for start, stop in bounds], header.dtype)
        if out.size == 0:
            return out
        try:
            with stored.file.open("rb", buffering=0) as file:
                _read_slice(file, stored.offset, header.shape, bounds, out)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{stored.file}: cannot read {name}: {error}. The file changed or its disk failed "
                "while in use; restore it and start again."
            ) from error
        return out


def write_hf(
    destination: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray | LazyTensor]],
    *,
    total_bytes: int = 0,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder; one shard of `tensors` is in memory at a time.

    Of a `LazyTensor` only one block at a time is.

    The folder appears complete or not at all: it is written beside `destination` and renamed.

    Args:
        config, generation_config: written as they are (no key added or dropped); an empty or absent
            generation config writes no file.
        tensors: (HF name, array) pairs in the order to store them.
        total_bytes: the sum of the tensors' sizes, for `progress` only; 0 when unknown.
        tokenizer_dir: folder whose tokenizer and chat-template files are copied.
        max_shard_bytes: a shard is closed before it grows beyond this; a larger tensor is alone.
        check: called with the finished folder; when it raises, nothing is left at `destination`.

    Raises CheckpointError for an unusable destination, a tensor given twice or a dtype that
    safetensors cannot hold, and whatever reading `tensors` raises.
    """
    destination = Path(destination)
    with folder_written_aside(destination, overwrite=overwrite) as folder:
        write_companions(folder, config, generation_config, tokenizer_dir)
        writer = _ShardWriter(folder, max_shard_bytes, total_bytes, progress)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.close()
        if check is not None:
            check(folder)
    return destination


def has_tokenizer(folder: Path) -> bool:
    """Return whether `folder` holds a tokenizer's files."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.tiktoken"))


def write_companions(
    folder: Path,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    tokenizer_dir: Path | None,
) -> None:
    """Write what a checkpoint holds beside its tensors: configs, tokenizer and processor files."""
    write_json(folder / "config.json", config)
    if generation_config:
        write_json(folder / "generation_config.json", generation_config)
    if tokenizer_dir is not None:
        for pattern in TOKENIZER_PATTERNS:
            for file in sorted(tokenizer_dir.glob(pattern)):
                if file.is_file():
                    copy = folder / file.relative_to(tokenizer_dir)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)


class _ShardWriter:
    """Collect tensors into shards and write each as soon as it is full."""

    def __init__(
        self, folder: Path, max_shard_bytes: int, expected_bytes: int, progress: Progress | None
    ):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.expected_bytes = expected_bytes
        self.progress = progress
        self.done_bytes = 0
        self.shards: list[Path] = []
        self.shard_of: dict[str, int] = {}
        self.total_bytes = 0
        self.pending: dict[str, np.ndarray | LazyTensor] = {}
        self.pending_bytes = 0

    def add(self, name: str, tensor: np.ndarray | LazyTensor) -> None:
        if name in self.shard_of:
            raise CheckpointError(f"{name} is written twice; every tensor needs its own name.")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{name} is {tensor.dtype}, which safetensors cannot hold. "
                f"Convert it to one of {sorted(map(str, DTYPE_NAMES))} first."
            )
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self.flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.shard_of[name] = len(self.shards)

    def flush(self) -> None:
        shard = self.folder / f"shard-{len(self.shards)}"
        write_safetensors(shard, self.pending, self.count)
        self.shards.append(shard)
        self.pending = {}
        self.pending_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Report that `num_bytes` more were written."""
        self.done_bytes += num_bytes
        if self.progress is not None:
            self.progress("writing", self.done_bytes, self.expected_bytes)

    def close(self) -> None:
        """Write what is left and give every shard its final name."""
        if self.pending or not self.shards:
            self.flush()
        count = len(self.shards)
        if count == 1:
            self.shards[0].rename(self.folder / "model.safetensors")
            return
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for shard, name in zip(self.shards, names, strict=True):
            shard.rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[shard] for name, shard in self.shard_of.items()},
        }
        write_json(self.folder / WEIGHT_INDEX, index)


def write_safetensors(
    file: Path,
    tensors: Mapping[str, np.ndarray | LazyTensor],
    wrote: Callable[[int], None],
) -> None:
    """Write one safetensors file in the given order, without a second copy in memory.

    Calls `wrote(bytes)` after each block.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors.values():
            for index in boxes(tensor.shape, tensor.dtype.itemsize):
                block = tensor.read(index) if isinstance(tensor, LazyTensor) else tensor[index]
                stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                wrote(block.nbytes)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError when it is absent, unreadable or something else."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not valid JSON ({error}). Download or write it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, expected an object.")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in their order, readable by people."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_stored(folder: Path) -> dict[str, StoredTensor]:
    """Find every tensor of the checkpoint and where it lies."""
    index_file = folder / WEIGHT_INDEX
    if index_file.exists():
        return _read_indexed(index_file)
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_describe_missing_weights(folder))
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_safetensors_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{name} is in both {stored[name].file} and {file}, and there is no "
                    f"{WEIGHT_INDEX} to tell which counts. Remove the file that does not belong."
                )
            stored[name] = tensor
    return stored


def _read_indexed(index_file: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map. Download or write it again.")
    shards = sorted(set(map(str, weight_map.values())))
    files = {shard: index_file.parent / shard for shard in shards}
    missing = [shard for shard in shards if not files[shard].is_file()]
    if missing:
        raise CheckpointError(
            f"{index_file} names {len(missing)} of {len(shards)} shards that are not there: "
            f"{', '.join(missing)}. Download them again into {index_file.parent}."
        )
    found = {shard: read_safetensors_header(file) for shard, file in files.items()}
    absent = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in found[shard]]
    if absent:
        raise CheckpointError(
            f"{index_file} names {len(absent)} tensors that their shards do not hold: "
            f"{', '.join(absent[:5])}{', …' if len(absent) > 5 else ''}. "
            "Index and shards are from different versions; download all of them again."
        )
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _describe_missing_weights(folder: Path) -> str:
    pytorch = sorted(file.name for pattern in PYTORCH_PATTERNS for file in folder.glob(pattern))
    if pytorch:
        return (
            f"{folder} holds PyTorch pickles only ({', '.join(pytorch[:3])}). Pickles can run "
            "code, so they are not read: convert them to safetensors with transformers "
            "(model.save_pretrained), or use a revision of the model that has safetensors."
        )
    return f"{folder} has a config.json but no *.safetensors. Download the weights into it."


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Parse and check one safetensors header against the size of its file.

    Raises CheckpointError for a file that is cut short, damaged, or not safetensors at all.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
            header_bytes = int.from_bytes(start[:8], "little")
            data_start = 8 + header_bytes
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull` in "
                    f"{file.parent}."
                )
            if size < 8 or data_start > size or header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is cut short or not a safetensors file: its header would be "
                    f"{header_bytes} bytes long, the file has {size}. Download it again."
                )
            stream.seek(8)
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        stored = {
            name: _parse_entry(file, name, entry, data_start) for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} has a damaged header ({type(error).__name__}: {error}); it is corrupt or not "
            "a safetensors file. Download it again."
        ) from error
    _check_layout(file, stored, data_start, size)
    return stored


def _parse_entry(file: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has dtype {entry['dtype']}, which cannot be read. "
            f"Readable: {', '.join(DTYPES)}. Convert the checkpoint to one of them."
        )
    shape = tuple(int(size) for size in entry["shape"])
    header = TensorHeader(name, shape, DTYPES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    if end - begin != header.num_bytes or min((begin, *shape)) < 0:
        raise ValueError(
            f"{name} of shape {shape} and dtype {entry['dtype']} has {end - begin} bytes"
        )
    return StoredTensor(header, file, data_start + begin)


def _check_layout(file: Path, stored: Mapping[str, StoredTensor], position: int, size: int) -> None:
    """Check that tensors lie one behind the other and fill the file to its last byte."""
    for name, tensor in sorted(
        stored.items(), key=lambda item: (item[1].offset, item[1].header.num_bytes)
    ):
        if tensor.offset != position:
            raise CheckpointError(
                f"{file} is corrupt: {name} begins at byte {tensor.offset}, expected {position}. "
                "Download it again."
            )
        position += tensor.header.num_bytes
    if position != size:
        kind = "cut short" if size < position else "corrupt"
        raise CheckpointError(
            f"{file} is {kind}: its header describes {position} bytes, the file has {size}. "
            "Download it again."
        )


def _read_slice(
    file: BinaryIO,
    offset: int,
    shape: tuple[int, ...],
    bounds: tuple[tuple[int, int], ...],
    out: np.ndarray,
) -> None:
    """Fill `out` with the part `bounds` of the array of `shape` at `offset`, in bounded chunks."""
    inner_whole = all(bound == (0, size) for bound, size in zip(bounds[1:], shape[1:], strict=True))
    row_bytes = math.prod(shape[1:]) * out.itemsize
    start, stop = bounds[0] if bounds else (0, 1)
    offset += start * row_bytes
    if inner_whole:
        _read_exactly(file, offset, out)
    elif len(shape) > 2 and row_bytes > READ_CHUNK_BYTES:
        for row in range(stop - start):
            _read_slice(file, offset + row * row_bytes, shape[1:], bounds[1:], out[row])
    else:
        step = max(1, READ_CHUNK_BYTES // row_bytes)
        inner = tuple(slice(*bound) for bound in bounds[1:])
        for row in range(0, stop - start, step):
            rows = min(step, stop - start - row)
            chunk = np.empty((rows, *shape[1:]), out.dtype)
            _read_exactly(file, offset + row * row_bytes, chunk)
            out[row : row + rows] = chunk[:, *inner]


def _read_exactly(file: BinaryIO, offset: int, out: np.ndarray) -> None:
    target = memoryview(out.reshape(-1).view(np.uint8))
    file.seek(offset)
    while target:
        count = file.readinto(target)
        if not count:
            raise EOFError(f"the file ends {len(target)} bytes early")
        target = target[count:]
