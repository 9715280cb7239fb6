"""Choosing one model with `--only-run`, and its real weights against transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import family_asked_for, local_folder

FETCH = (
    "import sys; from huggingface_hub import snapshot_download; print(snapshot_download("
    "sys.argv[1], allow_patterns=['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja']))"
)


def real_weights(hub_id: str) -> Path:
    """The model's folder: local, in the hub's cache, or fetched; skips where there is none."""
    if folder := local_folder(hub_id):
        return folder
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "10"}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, hub_id], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"no real weights: no $JAXSERVE_MODELS/{hub_id}, and the hub says: {reason}")
    return Path(done.stdout.strip().splitlines()[-1])


def test_real_weights_agree_with_transformers(hub_id: str) -> None:
    command = [sys.executable, "-m", "jaxserve", "verify", str(real_weights(hub_id))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("qwen2", "qwen2"),
        ("Qwen/Qwen2-1.5B", "qwen2"),  # an example
        ("mistralai/Mistral-Nemo-Base-2407", "mistral"),  # a published config
    ],
)
def test_a_family_or_a_hub_id_names_a_family(model: str, name: str) -> None:
    assert family_asked_for(model).name == name


def test_a_local_folder_names_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"]}')
    monkeypatch.setenv("JAXSERVE_MODELS", str(tmp_path))
    assert family_asked_for("org/mine").name == "phi3"


def test_an_unknown_model_is_a_usage_error() -> None:
    with pytest.raises(pytest.UsageError, match="--only-run org/unheard"):
        family_asked_for("org/unheard")
