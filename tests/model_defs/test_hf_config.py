"""The strict reader of config.json."""

from __future__ import annotations

import pytest

from model_defs.hf_config import HFConfig, UnsupportedConfig


def config(**fields) -> HFConfig:
    return HFConfig(fields, "TestForCausalLM")


def test_reading_a_key_gives_its_value() -> None:
    cfg = config(hidden_size=64)
    assert cfg["hidden_size"] == 64
    assert cfg.get("hidden_size", 1) == 64


def test_missing_key_is_named_with_the_architecture() -> None:
    with pytest.raises(UnsupportedConfig, match=r"TestForCausalLM.*'hidden_size'"):
        config()["hidden_size"]


def test_null_gives_the_default_of_get() -> None:
    assert config(head_dim=None).get("head_dim", 16) == 16
    assert config(tie=False).get("tie", True) is False
    assert config(eps=0).get("eps", 1) == 0


def test_required_key_may_be_null() -> None:
    assert config(sliding_window=None)["sliding_window"] is None


def test_unread_keys_are_all_named() -> None:
    cfg = config(a=1, b=2, hidden_size=64)
    cfg["hidden_size"]
    with pytest.raises(UnsupportedConfig, match=r"\['a', 'b'\].*family\.py"):
        cfg.check_all_read("family.py")


def test_bookkeeping_keys_and_nulls_need_no_reading() -> None:
    cfg = config(torch_dtype="bfloat16", transformers_version="4.0", eos_token_id=2, a=None)
    cfg.check_all_read("family.py")


def test_quantized_checkpoints_are_not_taken_for_plain_ones() -> None:
    assert config(quantization_config={"bits": 4}).unread() == ["quantization_config"]


def test_expected_value_passes_and_another_is_named() -> None:
    cfg = config(pretraining_tp=2, mlp_bias=False)
    cfg.expect("mlp_bias", False)
    cfg.expect("absent", 1)
    with pytest.raises(UnsupportedConfig, match=r"'pretraining_tp' is 2; implemented: 1"):
        cfg.expect("pretraining_tp", 1)


def test_keys_of_sub_configs_must_be_read_too() -> None:
    cfg = config(rope={"theta": 1.0, "inner": {"x": 1}})
    rope = cfg.sub("rope")
    rope["theta"]
    assert cfg.unread() == ["rope.inner"]
    rope.sub("inner")
    assert cfg.unread() == ["rope.inner.x"]


def test_sub_config_read_twice_is_the_same() -> None:
    cfg = config(rope={"local": 1, "full": 2})
    cfg.sub("rope")["local"]
    cfg.sub("rope")["full"]
    assert cfg.unread() == []


def test_missing_sub_config_gives_the_default() -> None:
    default = config()
    assert config(rope=None).sub("rope", default) is default
    with pytest.raises(UnsupportedConfig, match=r"'rope\.theta'"):
        config(rope={}).sub("rope")["theta"]


def test_layer_types_are_read_or_made() -> None:
    def every_second(i: int) -> str:
        return "full_attention" if i % 2 else "sliding_attention"

    made = ("sliding_attention", "full_attention")
    assert config(num_hidden_layers=2).layer_types(every_second) == made
    given = ["full_attention", "full_attention"]
    assert config(num_hidden_layers=2, layer_types=given).layer_types(every_second) == tuple(given)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["full_attention"], "names 1 layers.*is 2"),
        (["full_attention"] * 3, "names 3 layers.*is 2"),
        (["full_attention", "linear_attention"], "'linear_attention'"),
    ],
)
def test_wrong_layer_types_are_refused(kinds: list[str], message: str) -> None:
    cfg = config(num_hidden_layers=2, layer_types=kinds)
    with pytest.raises(UnsupportedConfig, match=message):
        cfg.layer_types(lambda i: "full_attention")
