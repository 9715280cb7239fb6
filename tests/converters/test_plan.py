"""Plans from headers: totals, sharding for machines that are elsewhere, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from converters.checkpoint import open_checkpoint
from converters.commands import plan as command
from converters.hf import HFCheckpoint, write_hf
from converters.plan import ModelPlan, plan_checkpoint
from jaxserve import cli
from model_defs.hf_config import UnsupportedConfig
from model_defs.sharding import ShardingRules, make_abstract_mesh
from model_defs.weights import WeightPlanError

from . import tiny_llama


def make_plan(folder: Path, dp_size: int = 1, tp_size: int = 1) -> ModelPlan:
    rules = ShardingRules(make_abstract_mesh(dp_size, tp_size))
    return plan_checkpoint(open_checkpoint(folder), rules)


def test_a_plan_names_every_tensor_once(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama.write(tmp_path / "m"))
    shapes = tiny_llama.shapes()
    rows = {row.source: row for row in plan.rows()}
    assert rows.keys() == shapes.keys()
    assert {source: row.shape for source, row in rows.items()} == shapes
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert plan.num_parameters == count
    assert plan.checkpoint_bytes == plan.bytes_per_device == 4 * count
    assert plan.dtype == np.float32
    q_proj = rows["model.layers.1.self_attn.q_proj.weight"]
    assert q_proj.name == "decoder.layers.1.mixer.q_proj.weight"
    assert (q_proj.array, q_proj.array_shape) == ("layers.1.mixer.qkv.weight", (24, 1, 40))


def test_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama.write(tmp_path / "m")
    monkeypatch.setattr(HFCheckpoint, "read", None)
    assert make_plan(folder).weights.dropped == ()


def test_a_mesh_larger_than_this_machine(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama.write(tmp_path / "m"), dp_size=4, tp_size=16)
    assert plan.rules.mesh.size == 64 > jax.device_count()
    for row in plan.rows():
        for size, axis in zip(row.array_shape, row.sharding, strict=True):
            assert axis is None or size % 16 == 0
    whole = make_plan(tmp_path / "m").bytes_per_device
    assert whole / 16 < plan.bytes_per_device < whole / 2  # heads and vocabulary are padded


def test_the_stored_dtype_is_the_default(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama.write(tmp_path / "m", dtype=ml_dtypes.bfloat16))
    assert plan.dtype == ml_dtypes.bfloat16
    assert plan.bytes_per_device == 2 * plan.num_parameters


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    tensors = dict(tiny_llama.tensors())
    tensors["model.layers.1.mlp.up_project.weight"] = tensors.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((24, 57), np.float32)
    tensors["model.layers.2.self_attn.sinks"] = np.zeros(6, np.float32)
    write_hf(tmp_path / "m", tiny_llama.CONFIG, tensors.items())
    with pytest.raises(WeightPlanError) as caught:
        make_plan(tmp_path / "m")
    message = str(caught.value)
    assert message.startswith("5 tensors do not fit")
    for line in (
        "missing: decoder.layers.1.ffn.up_proj.weight [56, 24] "
        "(stored as model.layers.1.mlp.up_proj.weight); "
        "nearest: decoder.layers.1.ffn.up_project.weight",
        "missing: decoder.norm.weight [24] (stored as model.norm.weight)",
        "unread: decoder.layers.2.mixer.sinks [6] (from model.layers.2.self_attn.sinks)",
        "mis-shaped: decoder.layers.0.ffn.down_proj.weight is [24, 57] "
        "(from model.layers.0.mlp.down_proj.weight), the config asks for [24, 56]",
    ):
        assert line in message


def test_fused_tensors_of_the_wrong_size_are_misfits_like_others(tmp_path: Path) -> None:
    config = {**tiny_llama.CONFIG, "architectures": ["Phi3ForCausalLM"]}
    tensors = {}
    for name, tensor in tiny_llama.tensors():
        if name.endswith(("q_proj.weight", "gate_proj.weight")):
            fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
            module = next(part for part in fused if part in name)
            rows = 39 if module == "q_proj" else 112  # qkv needs 24 + 8 + 8
            tensors[name.replace(module, fused[module])] = np.zeros((rows, 24), np.float32)
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            tensors[name] = tensor
    del tensors["model.norm.weight"]
    write_hf(tmp_path / "m", config, tensors.items())
    with pytest.raises(WeightPlanError) as caught:
        make_plan(tmp_path / "m")
    assert "4 tensors do not fit" in str(caught.value)  # three layers and the norm
    assert "v_proj.weight is [7, 24] (from model.layers.0.self_attn.qkv_proj.weight[32:39])" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "'NoSuchForCausalLM' is not known"),
        ({"architectures": []}, "no 'architectures'"),
        ({"secret_switch": 3}, r"were not read: \['secret_switch'\]"),
    ],
)
def test_configs_that_are_not_understood(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        make_plan(tiny_llama.write(tmp_path / "m", changes))


# ---- the command -----------------------------------------------------------------------------


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    tensors = {**dict(tiny_llama.tensors()), "model.layers.0.rotary_emb.inv_freq": np.zeros(2)}
    write_hf(folder, tiny_llama.CONFIG, tensors.items())
    assert cli.main(["plan", str(folder), "--tp-size", "16", "--dp-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["checkpoint", "canonical", "shape", "dtype"]
    assert len(lines) == 1 + 30 + 1 + 1
    row = next(line for line in lines if line.startswith("model.layers.2.mlp.down_proj.weight"))
    assert "decoder.layers.2.ffn.down_proj.weight" in row
    assert row.endswith("(expert+tensor, -, -)")
    assert lines[-2] == "not used: model.layers.0.rotary_emb.inv_freq"
    assert "30 tensors, " in lines[-1]
    assert "data 2 x expert 1 x tensor 16" in lines[-1]


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llama.write(tmp_path / "m")
    assert cli.main(["plan", str(folder), "--json", "--tp", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["architecture"] == "LlamaForCausalLM"
    assert content["mesh"] == {"data": 1, "expert": 1, "tensor": 2}
    assert content["dropped"] == []
    assert len(content["tensors"]) == 30
    assert content["tensors"][0]["name"] == "decoder.embed.weight"
    assert content["tensors"][0]["sharding"] == [["expert", "tensor"], None]


def test_a_terminal_gets_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that it draws on a terminal
    monkeypatch.setenv("COLUMNS", "100")
    command.print_table(make_plan(tiny_llama.write(tmp_path / "m")))
    out = capsys.readouterr().out
    assert "decoder.layers.0.mixer.k_proj.weight" in out
    assert "model.layers.0.self_attn.k_proj.weight" in out
    assert "│" in out


def test_a_misfit_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llama.write(tmp_path / "m", {"num_hidden_layers": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert cli.main(["plan", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "9 tensors do not fit" in error
    assert "missing: decoder.layers.4.mixer.q_proj.weight" in error


@pytest.mark.parametrize("size", ["0", "-2", "x"])
def test_a_mesh_size_must_be_a_positive_number(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "anything", f"--tp-size={size}"])
    assert caught.value.code == 2
    assert "--tp-size" in capsys.readouterr().err
