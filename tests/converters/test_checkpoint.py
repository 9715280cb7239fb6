"""`open_checkpoint`: what each kind of path, name and id leads to, and its errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

import converters.checkpoint
from converters.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from converters.gguf import GGUFCheckpoint
from converters.hf import HFCheckpoint, write_hf


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", {"a": 1}, [("t", np.zeros((2, 3), np.float32))])


@pytest.fixture
def gguf_file(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
) -> Path:
    return write_gguf("llama", decoder_metadata("llama"), decoder_tensors(llama_layer))


def test_a_folder_opens_as_hf(hf_folder: Path) -> None:
    for path in (hf_folder, str(hf_folder)):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint, HFCheckpoint)
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.path == hf_folder
        assert checkpoint.headers["t"].num_bytes == 24


def test_a_gguf_file_and_its_folder_open_alike(gguf_file: Path, tmp_path: Path) -> None:
    for path in (gguf_file, gguf_file.parent):
        checkpoint = open_checkpoint(path, download_dir=tmp_path / "cache")
        assert isinstance(checkpoint, GGUFCheckpoint)
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.path == gguf_file
        assert checkpoint.tokenizer_dir is None  # the file has no vocabulary


def test_a_folder_of_several_gguf_files_asks_which(gguf_file: Path) -> None:
    gguf_file.with_name("other.gguf").write_bytes(gguf_file.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files.*model\.gguf, other\.gguf"):
        open_checkpoint(gguf_file.parent)


@pytest.mark.parametrize("name", ["demo", "gemma-270m"])
def test_demo_names_lead_to_their_files(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []

    def fake(name: str, cache_dir: Path | None, progress: object) -> Path:
        asked.append((name, cache_dir))
        return gguf_file

    monkeypatch.setattr(converters.checkpoint, "demo_model_path", fake)
    assert open_checkpoint(name, download_dir=tmp_path).path == gguf_file
    assert asked == [(name, tmp_path)]


def test_a_path_that_does_not_exist_says_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist.*\.gguf.*hub id.*demo"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00\x01"])
def test_a_broken_config_is_named(hf_folder: Path, content: str) -> None:
    (hf_folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(hf_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.bin"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(CheckpointError, match=f"{name} is not a model"):
        open_checkpoint(tmp_path / name)


def test_a_hub_id_downloads_what_is_needed(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(hf_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    checkpoint = open_checkpoint("some-org/a.model_1", revision="v2", download_dir=tmp_path)
    assert checkpoint.path == hf_folder
    assert asked["repo_id"] == "some-org/a.model_1"
    assert asked["revision"] == "v2"
    assert asked["cache_dir"] == tmp_path
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])


def test_a_hub_out_of_reach_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"some-org/model is not a local path.*hub"):
        open_checkpoint("some-org/model", download_dir=tmp_path)  # tests run with the hub offline
