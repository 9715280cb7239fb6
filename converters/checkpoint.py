"""Open a checkpoint, whatever it is: a folder, a GGUF file, a demo model or a hub id.

`OPENERS` is the table of local formats: (test, opener) pairs, first match wins.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converters.demo import DEMO_MODELS, demo_model_path
from converters.errors import CheckpointError
from converters.gguf import GGUFCheckpoint
from converters.hf import HFCheckpoint, has_tokenizer, read_json
from converters.interface import Checkpoint, Index, Progress, TensorHeader
from converters.orbax import OrbaxCheckpoint, is_orbax_folder

__all__ = [
    "OPENERS",
    "Checkpoint",
    "CheckpointError",
    "ConfigCheckpoint",
    "Index",
    "Progress",
    "TensorHeader",
    "open_checkpoint",
    "open_config",
    "read_config",
]

HUB_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
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
# Weights and settings of other formats, in folders of their own or beside.
HUB_IGNORED = (
    *("*/*.safetensors", "*/*.index.json", "*/*.model", "*/*.tiktoken", "tokenizer*/*"),
    *("consolidated*", "adapter_*"),
)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Opener = Callable[[Path, Path | None], Checkpoint]


def _is_gguf_file(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".gguf"


def _is_gguf_folder(path: Path) -> bool:
    return path.is_dir() and not (path / "config.json").exists() and len(_gguf_files(path)) == 1


def _is_hf_folder(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file()


def _gguf_files(folder: Path) -> list[Path]:
    """GGUF files of `folder`, a split file counted once by its first part."""
    files = sorted(folder.glob("*.gguf"))
    return [file for file in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", file.stem)]


def _open_gguf_folder(path: Path, cache_dir: Path | None) -> Checkpoint:
    return GGUFCheckpoint(_gguf_files(path)[0], cache_dir)


def _open_orbax_folder(path: Path, cache_dir: Path | None) -> Checkpoint:
    return OrbaxCheckpoint(path)


def _open_hf_folder(path: Path, cache_dir: Path | None) -> Checkpoint:
    return HFCheckpoint(path)


OPENERS: tuple[tuple[Callable[[Path], bool], Opener], ...] = (
    (_is_gguf_file, GGUFCheckpoint),
    (is_orbax_folder, _open_orbax_folder),
    (_is_gguf_folder, _open_gguf_folder),
    (_is_hf_folder, _open_hf_folder),
)


def open_checkpoint(
    path_or_id: str | Path,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a checkpoint; only headers and configuration are read.

    Args:
        path_or_id: a local folder or `.gguf` file, the name of a demo model (`demo`,
            `gemma-270m`; a folder of that name is `./demo`) or a hub id (`org/name`).
        revision: branch, tag or commit of a hub id.
        download_dir: where downloads (and tokenizers rebuilt from GGUF files) are kept; None means
            the hub's own cache and the user's cache folder.
        progress: told about the download of a demo model.

    Raises CheckpointError naming the file and the remedy.
    """
    cache_dir = None if download_dir is None else Path(download_dir).expanduser()
    path = Path(path_or_id).expanduser()
    if path_or_id in DEMO_MODELS:
        path = demo_model_path(str(path_or_id), cache_dir, progress)
    elif not path.exists():
        path = _download_from_hub(str(path_or_id), revision, cache_dir)
    for is_format, opener in OPENERS:
        if is_format(path):
            return opener(path, cache_dir)
    raise CheckpointError(_describe_unknown(path))


class ConfigCheckpoint:
    """A checkpoint without weights: its config.json, and what else its folder says.

    Args:
        path: the folder, or the path of a config.json under whatever name.
    """

    canonical = False

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json" if path.is_dir() else path)
        generation = path / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            read_json(generation) if generation.exists() else {}
        )
        self.headers: Mapping[str, TensorHeader] = {}

    @property
    def tokenizer_dir(self) -> Path | None:
        return self.path if self.path.is_dir() and has_tokenizer(self.path) else None

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        raise CheckpointError(f"{self.path} was opened for its config: {name} is not read.")


def open_config(
    path_or_id: str | Path,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a checkpoint for everything but its weights, which need not be there.

    Takes what `open_checkpoint` takes, and the path of a config.json. Of a hub model no weights are
    fetched. Raises CheckpointError.
    """
    cache_dir = None if download_dir is None else Path(download_dir).expanduser()
    path = Path(path_or_id).expanduser()
    if path_or_id not in DEMO_MODELS and not path.exists():
        patterns = [pattern for pattern in HUB_PATTERNS if pattern not in WEIGHT_PATTERNS]
        path = _download_from_hub(str(path_or_id), revision, cache_dir, patterns)
    is_file = path.is_file() and path.suffix.lower() == ".json"
    if path_or_id not in DEMO_MODELS and (
        is_file or (_is_hf_folder(path) and not is_orbax_folder(path))
    ):
        return ConfigCheckpoint(path)
    return open_checkpoint(path_or_id, revision, download_dir, progress)


def read_config(
    path_or_id: str | Path,
    revision: str | None = None,
    download_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Read the config.json of a model, or what stands for it; weights need not be there.

    Takes what `open_checkpoint` takes; of a hub model only config.json is fetched.
    Raises CheckpointError.
    """
    cache_dir = None if download_dir is None else Path(download_dir).expanduser()
    path = Path(path_or_id).expanduser()
    if path_or_id not in DEMO_MODELS and not path.exists():
        path = _download_from_hub(str(path_or_id), revision, cache_dir, ("config.json",))
    if path_or_id not in DEMO_MODELS and _is_hf_folder(path) and not is_orbax_folder(path):
        return read_json(path / "config.json")
    return open_checkpoint(path_or_id, revision, cache_dir).config


def _download_from_hub(
    repo_id: str,
    revision: str | None,
    cache_dir: Path | None,
    patterns: Sequence[str] = HUB_PATTERNS,
) -> Path:
    """Fetch the files of a hub model that match `patterns`; return the local folder."""
    if not HUB_ID.fullmatch(repo_id) or repo_id.startswith("."):
        demos = ", ".join(DEMO_MODELS)
        raise CheckpointError(
            f"{repo_id} does not exist. Give a folder with config.json and *.safetensors, a .gguf "
            f"file, a hub id such as org/name, or a demo model ({demos})."
        )
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(HUB_IGNORED),
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {revision}; check the spelling."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{repo_id} is neither a local path nor a model on the hub{at}. Check the spelling; "
            "for a private model log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo_id} is not a local path, and it could not be fetched from the hub{at} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Check the network, or give the path of a local copy."
        ) from error


def _describe_unknown(path: Path) -> str:
    if path.is_file():
        return (
            f"{path} is not a model: expected a .gguf file or a folder with config.json and "
            "*.safetensors. For a single .safetensors file give its folder, config.json beside it."
        )
    files = _gguf_files(path)
    if files:
        names = ", ".join(file.name for file in files[:4])
        return f"{path} holds several GGUF files ({names}). Give the path of one of them."
    return (
        f"{path} has no config.json, so it is not a checkpoint folder. Give the folder that holds "
        "config.json and *.safetensors, or a .gguf file."
    )
