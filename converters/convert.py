"""Convert between formats: one block of one tensor in memory at a time, complete or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.checkpoint import open_checkpoint
from converters.errors import CheckpointError
from converters.hf import write_hf
from converters.interface import Checkpoint, Progress
from converters.lazy import LazyTensor, boxes, is_float
from converters.orbax import OrbaxCheckpoint, write_orbax
from converters.plan import headers_of, plan_checkpoint
from model_defs import weights
from model_defs.registry import family_of
from model_defs.sharding import ShardingRules, make_abstract_mesh
from model_defs.weights import Expr

FORMATS = ("orbax", "hf")
DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        destination: the folder written.
        num_tensors, num_bytes: stored there.
        num_verified: tensors read back and found equal to the source; 0 without `verify`.
        dropped: tensors of the source that are no weights and were left out.
    """

    destination: Path
    num_tensors: int
    num_bytes: int
    num_verified: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Contents:
    """The tensors to write and what the formats note beside them."""

    tensors: dict[str, LazyTensor]
    source_names: tuple[str, ...]
    dropped: tuple[str, ...]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint `src` as the folder `dst`.

    Args:
        src, revision, download_dir: as `open_checkpoint` takes them.
        to: "orbax" or "hf".
        dtype: "float32", "bfloat16" or "float16" for every floating-point tensor; None keeps each.
        verify: read `dst` back and compare every tensor, bit by bit, before it gets its name.
        overwrite: replace `dst` when it is a checkpoint.
        max_shard_bytes: of the HF files; None: 5 GB, or the source's own largest file if smaller.

    Raises CheckpointError, UnsupportedConfig or WeightPlanError; `dst` is then as it was before.
    """
    if to not in FORMATS:
        raise CheckpointError(f"--to {to} is not a format; give one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype} is not known; give one of {', '.join(DTYPES)}.")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise CheckpointError(f"--max-shard-bytes is {max_shard_bytes}; it must be at least 1.")
    source, destination = open_checkpoint(src, revision, download_dir, progress), Path(dst)
    _check_apart(source.path, destination)
    contents = _canonical(source, progress) if to == "orbax" else _stored(source)
    tensors = {
        name: tensor.astype(DTYPES[dtype], name) if dtype and is_float(tensor.dtype) else tensor
        for name, tensor in contents.tensors.items()
    }
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    largest = _largest_file(source)
    check = _verifier(tensors, progress) if verify else None
    try:
        if to == "orbax":
            write_orbax(
                destination,
                _with_dtype(source.config, dtype),
                tensors,
                source_names=contents.source_names,
                max_shard_bytes=largest,
                generation_config=source.generation_config,
                tokenizer_dir=source.tokenizer_dir,
                overwrite=overwrite,
                progress=progress,
                check=check,
            )
        else:
            write_hf(
                destination,
                _with_dtype(source.config, dtype),
                tensors.items(),
                total_bytes=num_bytes,
                generation_config=source.generation_config,
                tokenizer_dir=source.tokenizer_dir,
                max_shard_bytes=max_shard_bytes or min(MAX_SHARD_BYTES, largest),
                overwrite=overwrite,
                progress=progress,
                check=check,
            )
    except OSError as error:
        raise CheckpointError(
            f"{destination} could not be written ({error.strerror or error}); nothing was left "
            f"there. {num_bytes / 1e9:.2f} GB are needed: make room, or choose another disk."
        ) from error
    num_verified = len(tensors) if verify else 0
    return Conversion(destination, len(tensors), num_bytes, num_verified, contents.dropped)


def _canonical(source: Checkpoint, progress: Progress | None) -> _Contents:
    """Every canonical tensor of the source, as its plan makes it."""
    plan = plan_checkpoint(source, ShardingRules(make_abstract_mesh(1, 1)))
    tensors = {name: _lazy(entry.expr, source.read) for name, entry in plan.weights.entries.items()}
    names = source.source_names if isinstance(source, OrbaxCheckpoint) else tuple(source.headers)
    headers = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    exported = _export(source, headers, names)
    # Unused and yet exported: a copy of another tensor, which is not stored twice. Is it a copy?
    copies = {name: exported[name] for name in plan.weights.dropped if name in exported}
    wrong = _differences(
        {name: _stored_tensor(source, name) for name in copies},
        {name: _lazy(expr, _reader(tensors)) for name, expr in copies.items()},
        "checking tied tensors",
        progress,
    )
    if wrong:
        raise CheckpointError(
            f"{source.path}: by its config.json {', '.join(wrong)} repeats another tensor, but the "
            'two differ. If it is a tensor of its own, set "tie_word_embeddings": false.'
        )
    dropped = tuple(name for name in plan.weights.dropped if name not in exported)
    return _Contents(tensors, tuple(name for name in names if name in exported), dropped)


def _stored(source: Checkpoint) -> _Contents:
    """Every tensor under its HF name: as stored, or exported from canonical ones."""
    if not isinstance(source, OrbaxCheckpoint):
        tensors = {name: _stored_tensor(source, name) for name in source.headers}
        return _Contents(tensors, tuple(tensors), ())
    plan_checkpoint(source, ShardingRules(make_abstract_mesh(1, 1)))  # complete and well shaped
    exported = _export(source, headers_of(source), source.source_names)
    tensors = {name: _lazy(expr, source.read) for name, expr in exported.items()}
    return _Contents(tensors, source.source_names, ())


def _export(
    source: Checkpoint, headers: Mapping[str, tuple[tuple[int, ...], str]], names: tuple[str, ...]
) -> dict[str, Expr]:
    rules = family_of(source.config).rules(source.config)
    return weights.export(rules, headers, names)


def _lazy(expr: Expr, read: weights.Read) -> LazyTensor:
    return LazyTensor(expr.shape, np.dtype(expr.dtype), lambda index: expr.read(index, read))


def _stored_tensor(checkpoint: Checkpoint, name: str) -> LazyTensor:
    header = checkpoint.headers[name]
    return LazyTensor(header.shape, header.dtype, lambda index: checkpoint.read(name, index))


def _reader(tensors: Mapping[str, LazyTensor]) -> weights.Read:
    return lambda name, index: tensors[name].read(index)


def _verifier(
    tensors: Mapping[str, LazyTensor], progress: Progress | None
) -> Callable[[Path], None]:
    """Return a function that raises CheckpointError unless a folder holds exactly `tensors`."""

    def check(folder: Path) -> None:
        written = open_checkpoint(folder)
        found = {name: _stored_tensor(written, name) for name in written.headers}
        wrong = _differences(found, tensors, "verifying", progress)
        if wrong:
            raise CheckpointError(
                f"verification failed: {len(wrong)} of {len(tensors)} tensors differ from the "
                f"source: {', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}. Nothing was "
                "left at the destination; check the disk and convert again."
            )

    return check


def _differences(
    found: Mapping[str, LazyTensor],
    wanted: Mapping[str, LazyTensor],
    stage: str,
    progress: Progress | None,
) -> list[str]:
    """Names of the tensors that only one side has, or that differ in shape, dtype or any bit."""
    total_bytes, done_bytes = sum(tensor.nbytes for tensor in wanted.values()), 0
    wrong = sorted(found.keys() ^ wanted.keys())
    for name in wanted.keys() & found.keys():
        left, right = found[name], wanted[name]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            wrong.append(name)
            continue
        for index in boxes(right.shape, right.dtype.itemsize):
            if not _same_bits(left.read(index), right.read(index)):
                wrong.append(name)
                break
        done_bytes += right.nbytes
        if progress is not None:
            progress(stage, done_bytes, total_bytes)
    return wrong


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Compare two arrays of one shape and dtype as bytes: NaN equals itself, -0 is not 0."""
    left, right = (np.ascontiguousarray(array).reshape(-1) for array in (left, right))
    return np.array_equal(left.view(np.uint8), right.view(np.uint8))


def _check_apart(source: Path, destination: Path) -> None:
    source, destination = source.resolve(), destination.expanduser().resolve()
    if destination == source or destination in source.parents or source in destination.parents:
        raise CheckpointError(
            f"{destination} and the source {source} are not apart. Choose another destination."
        )


def _largest_file(source: Checkpoint) -> int:
    """Bytes of the source's largest file of weights: what one shard of it is."""
    if isinstance(source, OrbaxCheckpoint):
        return source.max_shard_bytes
    if source.path.is_file():
        return source.path.stat().st_size
    return max(file.stat().st_size for file in source.path.glob("*.safetensors"))


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return the config.json of the converted checkpoint."""
    if dtype is None:
        return dict(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}
