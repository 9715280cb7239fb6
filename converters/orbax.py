"""Read and write canonical weights as an Orbax checkpoint.

A folder holds

    params/                    an Orbax PyTree: nested dicts along the canonical names' dots
    jaxserve.json              the manifest: tensors, the source's names, every file's size
    config.json, generation_config.json, tokenizer files

`params/` is what any Orbax user restores with `ocp.StandardCheckpointer().restore(DIR / "params")`.
Its arrays are uncompressed zarr, cut into chunks, so that a slice costs little more than its own
bytes. They are stored as the model definitions name them: unfused, unpadded, the same for any mesh.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from converters.errors import CheckpointError
from converters.hf import DTYPE_NAMES, has_tokenizer, read_json, write_companions, write_json
from converters.interface import Index, Progress, TensorHeader, slice_bounds
from converters.lazy import LazyTensor, boxes
from converters.write_aside import folder_written_aside

PARAMS = "params"
MANIFEST = "jaxserve.json"
FORMAT_VERSION = 1
ORBAX_METADATA = (
    "_METADATA",
    "_CHECKPOINT_METADATA",
)  # files by which Orbax's own folders are known
CHUNK_BYTES = 1 << 24
MAX_OPEN_FILES = 4  # chunks in flight: bounds what a read or write needs beside its own array
DTYPES: Mapping[str, np.dtype] = {str(dtype): dtype for dtype in DTYPE_NAMES}


def is_orbax_folder(path: Path) -> bool:
    """Return whether `path` is a folder Orbax, or this module, wrote."""
    folders = (path, path / PARAMS)
    return (path / MANIFEST).is_file() or any(
        (folder / name).is_file() for folder in folders for name in ORBAX_METADATA
    )


class OrbaxCheckpoint:
    """A folder written by `write_orbax`.

    Opening it reads the manifest and checks every file's size.

    Attributes:
        source_names: the tensors of the HF checkpoint it was made from, in their order.
        max_shard_bytes: the largest shard of that checkpoint.

    Raises CheckpointError at once for a folder that is incomplete, cut short or not ours.
    """

    canonical = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        _check_files(self.path, manifest["files"])
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            read_json(generation) if generation.exists() else {}
        )
        self.source_names: tuple[str, ...] = tuple(manifest["source"]["names"])
        self.max_shard_bytes: int = manifest["source"]["max_shard_bytes"]
        self.headers: Mapping[str, TensorHeader] = {
            name: TensorHeader(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            for name, entry in manifest["tensors"].items()
        }
        self._context = _io_context()

    @property
    def tokenizer_dir(self) -> Path | None:
        """This folder when it holds a tokenizer, else None."""
        return self.path if has_tokenizer(self.path) else None

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read one tensor, or the part that `index` names, from the chunks that hold it.

        Raises KeyError for a name not in `headers` and CheckpointError for damaged files.
        """
        header = self.headers[name]
        bounds = slice_bounds(name, header.shape, index)
        spec = _array_spec(self.path / PARAMS / name) | {"fill_missing_data_reads": False}
        try:
            stored = tensorstore.open(
                spec,
                open=True,
                read=True,
                dtype=tensorstore.dtype(header.dtype),
                shape=header.shape,
                context=self._context,
            ).result()
            return stored[tuple(slice(*bound) for bound in bounds)].read(order="C").result()
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{self.path / PARAMS / name} cannot be read ({_first_line(error)}). "
                "The checkpoint is damaged: convert or copy it again."
            ) from error


def write_orbax(
    destination: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    source_names: Sequence[str],
    max_shard_bytes: int,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder; one block of one tensor is in memory at a time.

    The folder appears complete or not at all: it is written beside `destination` and renamed.

    Args:
        tensors: by canonical name.
        source_names, max_shard_bytes: see `OrbaxCheckpoint`.
        tokenizer_dir: folder whose tokenizer and chat-template files are copied.
        check: called with the finished folder; when it raises, nothing is left at `destination`.

    Raises CheckpointError for an unusable destination, and whatever reading `tensors` raises.
    """
    destination = Path(destination)
    with folder_written_aside(destination, overwrite=overwrite) as folder:
        write_companions(folder, config, generation_config, tokenizer_dir)
        _save_params(folder / PARAMS, tensors, progress)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        manifest = {
            "format": "jaxserve-orbax",
            "version": FORMAT_VERSION,
            "source": {"names": list(source_names), "max_shard_bytes": max_shard_bytes},
            "tensors": {
                name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
                for name, tensor in tensors.items()
            },
            "files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
        }
        write_json(folder / MANIFEST, manifest)
        if check is not None:
            check(folder)
    return destination


def nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots into nested dicts: the tree under which Orbax knows the tensors."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensor
    return tree


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return chunks of at most CHUNK_BYTES, nearly square: slices along any axis stay cheap."""
    chunk = [max(1, size) for size in shape]
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return tuple(chunk)


def _save_params(
    folder: Path, tensors: Mapping[str, LazyTensor], progress: Progress | None
) -> None:
    """Let Orbax save the tree; its arrays are streamed by our own handler of lazy tensors."""
    import orbax.checkpoint as ocp

    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    context = _io_context()

    class StreamingHandler(ocp.type_handlers.NumpyHandler):
        """Saves a `LazyTensor` block by block, and calls it what it then is: a numpy array."""

        done_bytes = 0

        async def serialize(self, values, infos, args=None):
            for value, info in zip(values, infos, strict=True):
                for num_bytes in _write_array(info.parent_dir / info.name, value, context):
                    self.done_bytes += num_bytes
                    if progress is not None:
                        progress("writing", self.done_bytes, total_bytes)
            return []

    registry = ocp.type_handlers.create_type_handler_registry((LazyTensor, StreamingHandler()))
    with _absl_warnings_off():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, nested(tensors))


def _write_array(folder: Path, tensor: LazyTensor, context: tensorstore.Context) -> Iterator[int]:
    """Write `tensor` as zarr; yields the bytes written since the last time."""
    chunk = chunk_shape(tensor.shape, tensor.dtype.itemsize)
    metadata = {"chunks": chunk, "compressor": None, "dimension_separator": "."}
    spec = _array_spec(folder) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    array = tensorstore.open(
        spec,
        create=True,
        open=False,
        write=True,
        dtype=tensorstore.dtype(tensor.dtype),
        shape=tensor.shape,
        context=context,
    ).result()
    for index in boxes(tensor.shape, tensor.dtype.itemsize, chunk=chunk):
        block = tensor.read(index)
        try:
            array[index].write(block, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:  # what tensorstore makes of most errors of the file system
            raise OSError(f"{folder}: {_first_line(error)}") from error
        yield block.nbytes


def _array_spec(folder: Path) -> dict[str, Any]:
    """Return the place and format of one array as Orbax lays it out."""
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}


def _io_context() -> tensorstore.Context:
    return tensorstore.Context({"file_io_concurrency": {"limit": MAX_OPEN_FILES}})


@contextlib.contextmanager
def _absl_warnings_off() -> Iterator[None]:
    """Orbax warns that there is nothing of jax.Array and OCDBT, which is as it should be."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is an Orbax checkpoint without {MANIFEST}: either incomplete or written by "
            "another program. Write it with `jaxserve convert SRC DST --to orbax`."
        )
    manifest = read_json(file)
    version = manifest.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this program reads {FORMAT_VERSION}. "
            "Convert the original checkpoint again."
        )
    try:
        unknown = {entry["dtype"] for entry in manifest["tensors"].values()} - DTYPES.keys()
        complete = all(key in manifest["source"] for key in ("names", "max_shard_bytes"))
        complete = complete and isinstance(manifest["files"], dict) and not unknown
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise CheckpointError(f"{file} is damaged. Convert or copy the checkpoint again.")
    return manifest


def _check_files(folder: Path, files: Mapping[str, int]) -> None:
    """Raise CheckpointError naming the files that are missing or have another size than written."""
    wrong = []
    for name, size in files.items():
        if not name.startswith(f"{PARAMS}/"):
            continue  # config and tokenizer may be edited
        try:
            found = (folder / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes of {size}")
    if wrong:
        raise CheckpointError(
            f"{folder} is damaged: {len(wrong)} of its files are not as they were written: "
            f"{', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}. Convert or copy it again."
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
