"""`jaxserve show` and `jaxserve models`, and the README's table of families."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from jaxserve import cli, show
from model_defs.decoder import DecoderSpec, Layer
from model_defs.registry import Family, ModelRegistry, family_of, list_families

ROOT = Path(cli.__file__).parents[1]
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_config_alone_is_enough(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show", str(config_only))
    spans = [line for line in text.splitlines() if line.startswith("layer")]
    expected = ("layers 0-1 (2 equal)", "layer 2", "layers 3-4 (2 equal)", "layer 5", "layer 6")
    assert spans == list(expected)
    assert text.count("window=512") == 3
    assert "model_defs/gemma3.py" in text
    layer = 64 * 96 * 3 + 64 * (64 + 16 + 16) + 64 * 64 + 4 * 64 + 2 * 16
    parameters = 300 * 64 + 7 * layer + 64
    assert f"parameters    {parameters:,}\n" in text
    assert f"weights       {2 * parameters:,} bytes in bfloat16" in text
    assert f"KV cache      {7 * 2 * 16 * 2} bytes a token in bfloat16" in text


def test_bytes_are_counted_in_the_dtype_asked_for(
    config_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, "show", str(config_only), "--dtype", "float32")
    assert f"KV cache      {7 * 2 * 16 * 4} bytes a token in float32" in text


def test_of_a_hub_model_only_the_config_is_fetched(
    config_only: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(config_only)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert "Gemma3ForCausalLM" in shown(capsys, "show", "org/model", "--revision", "v1")
    assert asked["repo_id"] == "org/model" and asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NobodysForCausalLM"]}, "NobodysForCausalLM"),
        ({"new_trick": 3}, "new_trick"),
    ],
)
def test_what_cannot_be_served_is_one_error_line(
    config_only: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    (config_only / "config.json").write_text(json.dumps(CONFIG | change), "utf-8")
    assert cli.main(["show", str(config_only)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_names_stand_apart_from_values_and_what_is_not_there_is_left_out() -> None:
    lines = show.description(CONFIG)
    assert not any(line.endswith(("None", "False")) for line in lines)
    names = [field.name for field in (*fields(DecoderSpec), *fields(Layer))]
    for line in lines:
        first = line.split()[:1]
        assert first == [] or first[0] in names or not line.lstrip().startswith(tuple(names)), line


def test_long_tuples_are_cut() -> None:
    config = json.loads((ROOT / "tests/goldens/phi3_longrope-a/config.json").read_text("utf-8"))
    text = "\n".join(show.description(config))
    assert "short=(1.05, 1.1, 1.15, 1.2, 1.3, 1.5, ... 8 values)" in text


def test_models_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "models")
    for architecture, family in ModelRegistry.models.items():
        assert architecture in text
        assert all(example in text for example in family.examples)
    assert "demo, real weights" in text


def test_what_a_family_claims_to_be_checked_against_is_there() -> None:
    folders = (ROOT / "tests" / "goldens").iterdir()
    configs = [json.loads((f / "config.json").read_text("utf-8")) for f in folders]
    golden = {config["architectures"][0] for config in configs}
    for family in list_families():
        if family.reference == "transformers":
            fields = [tiny.get("architectures", family.architectures[:1]) for tiny in family.tiny]
            assert fields and all(hasattr(transformers, name) for (name,) in fields), family.name
        elif family.home.startswith("model_defs/"):
            assert family.reference == "original" and not family.tiny
            assert golden & set(family.architectures), family.name
        else:
            assert family.reference is None


def test_models_lists_families_from_outside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = family_of(CONFIG).build
    mine = Family("mine", ("MineForCausalLM",), build, ())
    monkeypatch.setitem(ModelRegistry.models, "MineForCausalLM", mine)
    (line,) = [x for x in shown(capsys, "models", "--markdown").splitlines() if "Mine" in x]
    assert line.startswith("| mine | `MineForCausalLM` |") and line.endswith("| nothing yet |")


def test_the_readme_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    expected = shown(capsys, "models", "--markdown").strip()
    readme = (ROOT / "README.md").read_text("utf-8")
    _, _, rest = readme.partition("<!-- families -->")
    found, end, _ = rest.partition("<!-- /families -->")
    assert end, "README.md has no <!-- families --> ... <!-- /families -->"
    message = f"put this between the markers in README.md (jaxserve models --markdown):\n{expected}"
    assert found.strip() == expected, message
