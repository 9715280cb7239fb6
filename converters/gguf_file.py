"""Parse a GGUF file's metadata and tensor table, and dequantize rows of its tensors.

The metadata is parsed here because the gguf library's reader makes several numpy objects per
vocabulary entry (ten seconds for 262,144 tokens); the quantization formats are the library's.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from converters.errors import CheckpointError

GGML = gguf.GGMLQuantizationType

MAX_METADATA_BYTES = 1 << 30
DEQUANTIZE_GROUP_VALUES = 1 << 14  # values per row handed to the library: small rows are slow there

# GGUF value type -> struct code
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_FLOATS = {
    GGML.F32: np.float32,
    GGML.F16: np.float16,
    GGML.BF16: ml_dtypes.bfloat16,
    GGML.F64: np.float64,
}


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor: numpy-order shape, storage type, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    file: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last axis."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block_values * block_bytes

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of the tensor seen as `[num_rows, shape[-1]]`, float32."""
        num_bytes = (stop - start) * self.row_bytes
        raw = np.empty(num_bytes, np.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.row_bytes)
            target = memoryview(raw)
            while target:
                count = file.readinto(target)
                if not count:
                    raise CheckpointError(
                        f"{self.file} ends within {self.name}; download it again."
                    )
                target = target[count:]
        return dequantize(raw, self.type).reshape(stop - start, self.shape[-1])


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensor table of a GGUF file; of a split one, those of all its parts."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read everything but the tensors' bytes; `path` of a split file is its first part.

    Raises CheckpointError for a file that is not GGUF, cut short, or a part of a missing whole.
    """
    metadata, tensors = _read_part(path)
    num_parts = metadata.get("split.count")
    if isinstance(num_parts, int) and num_parts > 1:
        match = re.fullmatch(r"(.*)-00001-of-(\d{5})", path.stem)
        if match is None or int(match[2]) != num_parts:
            raise CheckpointError(
                f"{path} is one of {num_parts} parts of a split file. Give the path of the first, "
                f"named …-00001-of-{num_parts:05d}.gguf, with the others beside it."
            )
        for part in range(2, num_parts + 1):
            sibling = path.with_name(f"{match[1]}-{part:05d}-of-{match[2]}.gguf")
            tensors |= _read_part(sibling)[1]
    return GGUFFile(path, metadata, tensors)


def dequantize(raw: np.ndarray, type: gguf.GGMLQuantizationType) -> np.ndarray:
    """Turn the bytes `raw: uint8[n]` of whole blocks into flat float32 values.

    Raises NotImplementedError for a type the gguf library cannot dequantize.
    """
    if type in _FLOATS:
        return raw.view(_FLOATS[type]).astype(np.float32, copy=False)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[type]
    row_bytes = max(1, DEQUANTIZE_GROUP_VALUES // block_values) * block_bytes
    whole = len(raw) // row_bytes * row_bytes
    parts = [raw[:whole].reshape(-1, row_bytes), raw[whole:].reshape(1, -1)]
    values = [gguf.dequantize(part, type).reshape(-1) for part in parts if part.size]
    return values[0] if len(values) == 1 else np.concatenate([np.empty(0, np.float32), *values])


def can_dequantize(type: gguf.GGMLQuantizationType) -> bool:
    """Whether `dequantize` knows the type, found by trying it on one block of zeros."""
    if type in _FLOATS:
        return True
    try:
        dequantize(np.zeros(gguf.GGML_QUANT_SIZES[type][1], np.uint8), type)
    except NotImplementedError:
        return False
    return True


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the model. Run `git lfs pull` in "
                    f"{path.parent}."
                )
            if start[:4] != b"GGUF":
                raise CheckpointError(
                    f"{path} is not a GGUF file (it does not begin with 'GGUF'). Download it "
                    "again, or give a folder with config.json and *.safetensors."
                )
            if len(start) < 24:
                raise CheckpointError(f"{path} is cut short after {size} bytes. Download it again.")
            version = int.from_bytes(start[4:8], "little")
            if version not in gguf.gguf_reader.READER_SUPPORTED_VERSIONS:
                raise CheckpointError(
                    f"{path} is GGUF version {version} (or big-endian); readable: "
                    f"{gguf.gguf_reader.READER_SUPPORTED_VERSIONS}. Convert it with a current "
                    "llama.cpp."
                )
            parsed = _parse_growing(file, size, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    metadata, table, data_start = parsed
    tensors = {}
    for name, shape, type_id, offset in table:
        tensors[name] = _make_tensor(path, name, shape, type_id, data_start + offset)
        end = tensors[name].offset + tensors[name].num_rows * tensors[name].row_bytes
        if end > size:
            raise CheckpointError(
                f"{path} is cut short: {name} ends at byte {end}, the file has {size}. "
                "Download it again."
            )
    return metadata, tensors


def _parse_growing(file, size: int, path: Path) -> tuple[dict[str, Any], list[tuple], int]:
    """Parse from a buffer that is doubled until it holds the whole metadata."""
    num_bytes = 1 << 24
    while True:
        file.seek(0)
        buffer = file.read(min(num_bytes, size))
        try:
            return _parse(buffer)
        except (struct.error, _CutShort) as error:
            if num_bytes >= min(size, MAX_METADATA_BYTES):
                raise CheckpointError(
                    f"{path} is cut short or corrupt: its metadata runs past the end of the file. "
                    "Download it again."
                ) from error
            num_bytes *= 2
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} is corrupt: its metadata cannot be read ({error}). Download it again."
            ) from error


_DAMAGE = (LookupError, ValueError, TypeError, ArithmeticError, RecursionError)
"""What parsing damaged metadata can raise."""


class _CutShort(Exception):
    """The buffer ends within a value."""


def _parse(buffer: bytes) -> tuple[dict[str, Any], list[tuple], int]:
    """Return metadata, (name, numpy shape, type id, offset) rows, and where the data starts."""
    num_tensors, num_keys = struct.unpack_from("<QQ", buffer, 8)
    position = 24
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, position = _parse_string(buffer, position)
        (kind,) = struct.unpack_from("<I", buffer, position)
        metadata[key], position = _parse_value(buffer, position + 4, kind)
    table = []
    for _ in range(num_tensors):
        name, position = _parse_string(buffer, position)
        (num_axes,) = struct.unpack_from("<I", buffer, position)
        sizes = struct.unpack_from(f"<{num_axes}Q", buffer, position + 4)
        position += 4 + 8 * num_axes
        type_id, offset = struct.unpack_from("<IQ", buffer, position)
        position += 12
        table.append((name, tuple(reversed(sizes)), type_id, offset))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    return metadata, table, position + -position % alignment


def _parse_string(buffer: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", buffer, position)
    end = position + 8 + length
    if end > len(buffer):
        raise _CutShort
    return buffer[position + 8 : end].decode(), end


def _parse_value(buffer: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _parse_string(buffer, position)
    if kind != _ARRAY:
        code = _SCALARS[kind]
        return struct.unpack_from(f"<{code}", buffer, position)[0], position + struct.calcsize(code)
    kind, length = struct.unpack_from("<IQ", buffer, position)
    position += 12
    if kind in _SCALARS:
        code = f"<{length}{_SCALARS[kind]}"
        return list(struct.unpack_from(code, buffer, position)), position + struct.calcsize(code)
    parse: Callable[[bytes, int], tuple[Any, int]]
    parse = _parse_string if kind == _STRING else lambda b, p: _parse_value(b, p, kind)
    values = []
    for _ in range(length):
        value, position = parse(buffer, position)
        values.append(value)
    return values, position


def _make_tensor(
    path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> GGUFTensor:
    try:
        type = GGML(type_id)
    except ValueError:
        raise CheckpointError(
            f"{path}: {name} is stored in quantization number {type_id}, which the installed gguf "
            "library does not know. Update it (`pip install -U gguf`)."
        ) from None
    block_values = gguf.GGML_QUANT_SIZES[type][0]
    if not shape or shape[-1] % block_values:
        raise CheckpointError(
            f"{path} is corrupt: {name} has shape {shape}, but {type.name} packs {block_values} "
            "values together. Download it again."
        )
    if not can_dequantize(type):
        raise CheckpointError(
            f"{path}: {name} is stored as {type.name}, which the gguf library cannot dequantize. "
            "Use another quantization of this model, for example Q8_0 or F16."
        )
    return GGUFTensor(name, shape, type, path, offset)
