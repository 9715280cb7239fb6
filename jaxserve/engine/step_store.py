"""Compiled steps on disk, found by what they were made from: a warm start traces nothing.

JAX's own compile cache finds an executable by its program, so the program must be traced and
lowered first, which takes as long as loading the executable. Here the key is a digest of everything
the program follows from: our source code, the model's spec, shapes and shardings, the versions of
JAX and Python, JAX's settings, the XLA environment, and the devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from converters.write_aside import file_written_aside
from jaxserve.config import EngineConfig, compile_cache_folder, compile_environment
from jaxserve.version import IMPORTED_AT_S

logger = logging.getLogger(__name__)

FORMAT = b"jaxserve step 1\n"
SUFFIX = ".step"
DIGEST_BYTES = 32
# JAX settings that change neither the program nor its machine code.
UNRELATED_SETTINGS = (
    *("jax_compilation_cache_", "jax_persistent_cache_", "jax_log_", "jax_logging_"),
    *("jax_debug_log_", "jax_traceback_"),
)
SOURCE_PACKAGES = ("jaxserve", "model_defs", "pallas_kernels")
SOURCE_SUFFIXES = frozenset({".py", ".json"})
CPUINFO = Path("/proc/cpuinfo")
CPUINFO_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")


class StepStore:
    """A folder of compiled steps.

    A file that is damaged, or that JAX refuses, is as good as absent. Executables are loaded and
    run, so the folder must belong to this user and be writable by nobody else; else it is unused.

    Args:
        folder: made when it is needed.
        max_bytes: the steps used longest ago are dropped beyond it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    @classmethod
    def of(cls, config: EngineConfig) -> StepStore | None:
        """The store inside the compile cache that `config` chose; None where that is off.

        A compile cache that was set through JAX itself is left to JAX alone.
        """
        folder = compile_cache_folder(config)
        if folder is None:
            return None
        return cls(folder / "steps", config.compile_cache_bytes)

    def load(
        self,
        key: str,
        in_tree: jax.tree_util.PyTreeDef,
        out_tree: jax.tree_util.PyTreeDef,
        devices: Sequence[jax.Device],
    ) -> jax.stages.Compiled | None:
        """Return the step stored under `key`, ready to run on `devices`; None if there is none."""
        path = self._path(key)
        try:
            if not self._is_private():
                return None
            data = path.read_bytes()
        except OSError:
            return None
        try:
            compiled = serialize_executable.deserialize_and_load(
                _unpack(data),
                in_tree,
                out_tree,
                backend=devices[0].client,
                execution_devices=devices,
            )
        except Exception as error:  # whatever an unpickler or the runtime objects to
            logger.warning("the stored step %s cannot be loaded (%s); compiling", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return compiled

    def save(self, key: str, compiled: jax.stages.Compiled) -> None:
        """Keep a step; failing to is logged and does no harm."""
        path = self._path(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private():
                logger.warning("%s can be written by others; no step is kept there", self.folder)
                return
            payload, _, _ = serialize_executable.serialize(compiled)
            with file_written_aside(path) as aside:
                aside.write_bytes(_pack(payload))
            self._shrink()
        except Exception as error:  # not every backend can serialize every executable
            logger.info("a compiled step was not kept in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _is_private(self) -> bool:
        status = self.folder.stat()
        return status.st_uid == os.getuid() and not status.st_mode & 0o022

    def _shrink(self) -> None:
        files = [(path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda item: item[0].st_mtime):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size


def step_key(parts: Iterable[object], devices: Sequence[jax.Device]) -> str | None:
    """Return the name of a step made from `parts` by this code, with this JAX, on these devices.

    None, and nothing is stored, when a part has no stable text (an object shown by its address), or
    a source file is newer than this process's code, which is then unknown.
    """
    if source_digest() is None:
        return None
    text = "\n".join(repr(part) for part in (*parts, *_surroundings(devices)))
    if " at 0x" in text:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _surroundings(devices: Sequence[jax.Device]) -> Iterable[object]:
    """Everything besides the model that decides what machine code comes out."""
    client = devices[0].client
    yield from (FORMAT, source_digest(), sys.version, platform.machine(), _cpu())
    yield from (jax.__version__, jaxlib.__version__, flax.__version__, np.__version__)
    yield from (client.platform, client.platform_version, client.process_index())
    yield [(device.id, device.device_kind) for device in devices]
    yield len(client.devices())
    yield _settings(jax.config.values)
    yield compile_environment()


def _settings(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return sorted(
        (name, repr(value))
        for name, value in values.items()
        if not name.startswith(UNRELATED_SETTINGS)
    )


@cache
def source_digest() -> str | None:
    """Digest of every source and data file of the packages a step is traced from.

    None when one was written after this process began to import them.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in SOURCE_PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                if path.stat().st_mtime > IMPORTED_AT_S:
                    return None
                data = path.read_bytes()
                name = path.relative_to(root).as_posix()
                digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


@cache
def _cpu() -> list[str]:
    """What identifies the host's CPU and its instruction sets: machine code is made for it."""
    if not CPUINFO.exists():
        return [platform.processor()]
    first = CPUINFO.read_text().split("\n\n")[0].splitlines()
    return [line for line in first if line.split("\t")[0].split(":")[0].strip() in CPUINFO_FIELDS]


def _pack(payload: bytes) -> bytes:
    body = zlib.compress(payload, 1)
    return FORMAT + hashlib.sha256(body).digest() + body


def _unpack(data: bytes) -> bytes:
    """Return what was packed; raises ValueError if a byte has changed since."""
    start = len(FORMAT) + DIGEST_BYTES
    body = data[start:]
    if data[: len(FORMAT)] != FORMAT or data[len(FORMAT) : start] != hashlib.sha256(body).digest():
        raise ValueError("it is damaged")
    return zlib.decompress(body)
