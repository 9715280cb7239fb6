"""How architectures get into the registry: from this package, by assignment, by entry point.

The examples are those of model_defs/README.md, taken from the text.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model_defs import registry
from model_defs.hf_config import UnsupportedConfig
from model_defs.llama import TINY, llama, llama_weights
from model_defs.registry import Family, ModelRegistry, family_of, get_family, list_families

from . import harness, hf_reference

README = Path(__file__).resolve().parents[2] / "model_defs" / "README.md"
ARCHITECTURES = {
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.S | re.M)


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder on sys.path whose modules, and what they register, are gone after the test."""
    modules = set(sys.modules)
    monkeypatch.setattr(ModelRegistry, "_models", dict(ModelRegistry.models))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def outside_family(architecture: str) -> Family:
    return Family(
        name="outside",
        architectures=(architecture,),
        build=llama,
        weights=llama_weights,
        home="outside.py",
    )


def assert_serves_llama(architecture: str, folder: Path) -> None:
    """The architecture must give the logits of transformers' Llama."""
    model = hf_reference.make_tiny("LlamaForCausalLM", TINY)
    config, tensors = hf_reference.save(model, folder)
    assert_logits_agree(model, {**config, "architectures": [architecture]}, tensors)


def assert_logits_agree(model, config, tensors) -> None:
    prompts = [[5, 77, 200, 3], [9, 8, 7]]
    ours = harness.full_logits(harness.load(config, tensors), prompts)
    for a, b in zip(ours, hf_reference.hf_logits(model, prompts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * b.std(), rtol=0)


def test_this_package_has_the_promised_architectures() -> None:
    assert set(ModelRegistry.models) >= ARCHITECTURES
    names = [family.name for family in list_families()]
    assert names == sorted(names)
    assert len(names) == len(set(names))


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedConfig, match="NoSuchModel") as error:
        get_family("NoSuchModel")
    assert "LlamaForCausalLM" in str(error.value)
    assert "README.md" in str(error.value)


def test_config_without_architectures_says_what_to_add() -> None:
    with pytest.raises(UnsupportedConfig, match="architectures"):
        family_of({"model_type": "llama"})


def test_readme_family_file_works_as_printed(scratch: Path) -> None:
    code = blocks("python")[0]
    (scratch / "example_family.py").write_text(code)
    importlib.import_module("example_family")
    family = get_family("ExampleForCausalLM")
    assert family.home == "example_family.py"
    # The reference is a model of transformers with just this structure.
    model = hf_reference.make_tiny("Qwen3ForCausalLM", family.tiny[0])
    config, tensors = hf_reference.save(model, scratch / "checkpoint")
    config = {**config, "architectures": ["ExampleForCausalLM"]}
    assert_logits_agree(model, config, tensors)
    with pytest.raises(UnsupportedConfig, match=r"example_family\.py"):
        family.spec({**config, "attn_scale_type": "x"})


def test_readme_assignment_works_as_printed(scratch: Path) -> None:
    exec(compile(blocks("python")[1], str(README), "exec"), {})
    assert_serves_llama("OutsideForCausalLM", scratch / "checkpoint")


def test_readme_entry_point_works_as_printed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    assert list(groups) == [registry.ENTRY_POINT_GROUP]
    install(scratch, groups[registry.ENTRY_POINT_GROUP])
    package = scratch / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "outside.py").write_text(
        blocks("python")[0].replace("ExampleForCausalLM", "PluginForCausalLM")
    )
    discover_again(monkeypatch)
    assert get_family("PluginForCausalLM").home == "my_package/outside.py"


def test_entry_point_may_name_a_family(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(scratch, {"outside": "outside_plugin:FAMILY"})
    (scratch / "outside_plugin.py").write_text(
        "from model_defs.llama import llama, llama_weights\n"
        "from model_defs.registry import Family\n"
        "FAMILY = Family('outside', ('DirectForCausalLM',), llama, llama_weights)\n"
    )
    discover_again(monkeypatch)
    assert_serves_llama("DirectForCausalLM", scratch / "checkpoint")


def test_broken_entry_point_is_named(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(scratch, {"outside": "no_such_module"})
    discover_again(monkeypatch)
    for _ in range(2):  # the second look must not find half a registry
        with pytest.raises(ImportError, match="no_such_module") as error:
            get_family("LlamaForCausalLM")
        assert "fake-plugin" in str(error.value)


def test_assignment_before_the_first_look_up_stays() -> None:
    code = (
        "from model_defs.registry import Family, ModelRegistry, get_family, list_families\n"
        "mine = Family('mine', ('LlamaForCausalLM',), build=None, weights=())\n"
        "ModelRegistry.models['LlamaForCausalLM'] = mine\n"
        "assert get_family('MistralForCausalLM').name == 'mistral'\n"
        "assert get_family('LlamaForCausalLM') is mine\n"
        "assert mine in list_families()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=README.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_one_family_may_serve_two_architectures() -> None:
    mine = outside_family("FirstForCausalLM")
    ModelRegistry.models["FirstForCausalLM"] = mine
    ModelRegistry.models["SecondForCausalLM"] = mine
    assert list_families().count(mine) == 1


def install(folder: Path, entry_points: dict[str, str]) -> None:
    """Write what pip leaves of a package with these entry points."""
    info = folder / "fake_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    text = "\n".join([f"[{registry.ENTRY_POINT_GROUP}]", *lines, ""])
    (info / "entry_points.txt").write_text(text)


def discover_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the registry look for families once more, as in a fresh process."""
    monkeypatch.setattr(ModelRegistry, "_discovered", False)
