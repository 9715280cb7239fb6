"""Write a file or folder beside its final place, then move it there in one rename."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from converters.errors import CheckpointError


@contextlib.contextmanager
def folder_written_aside(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `destination` when the block ends well.

    On any exception the sibling is removed and `destination` is as it was before.
    Raises CheckpointError when `destination` is a file or a folder that is not empty, unless
    `overwrite` is set and the folder holds a checkpoint (a `config.json`).
    """
    destination = Path(destination).expanduser().absolute()
    _check_replaceable(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = _sibling(destination)
    aside.mkdir()
    try:
        yield aside
        _check_replaceable(destination, overwrite)
        previous = None
        if destination.is_dir():
            previous = _sibling(destination)
            destination.rename(previous)
        try:
            aside.rename(destination)
        except OSError:
            if previous is not None:
                previous.rename(destination)
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if previous is not None:
        shutil.rmtree(previous)


@contextlib.contextmanager
def file_written_aside(destination: Path) -> Iterator[Path]:
    """Yield a sibling path that becomes `destination` when the block ends well, else goes away."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = _sibling(destination)
    try:
        yield aside
        aside.replace(destination)
    finally:
        aside.unlink(missing_ok=True)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def _check_replaceable(destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(
            f"{destination} is a file; a checkpoint is written as a folder. Choose another path."
        )
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{destination} exists and is not empty. Choose another path, or allow overwriting it "
            "(--overwrite)."
        )
    if not (destination / "config.json").is_file():
        raise CheckpointError(
            f"{destination} is not a checkpoint (it has no config.json), so it is not overwritten. "
            "Choose another path, or empty it yourself."
        )
