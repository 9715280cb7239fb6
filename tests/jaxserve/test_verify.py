"""`jaxserve verify`: what agrees passes, what does not is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from jaxserve import LLM, SamplingParams, cli, hf_reference
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.verification import compare, report
from jaxserve.verification.compare import GreedyResult, Report, StageResult, Tally, compare_greedy
from jaxserve.verification.reference import (
    Reference,
    VerifyError,
    make_prompts,
    read_golden,
)
from jaxserve.verification.run import VerifyOptions, verify

from ..model_defs import formulas

ROOT = Path(cli.__file__).parents[1]
# The family suite computes every stored checkpoint; the command itself needs one of each kind.
GOLDENS = [
    ROOT / "tests" / "goldens" / f"{name}-a"
    for name in (
        "baichuan2_13b",  # ALiBi, no rope
        "internlm2_reward",  # scores of texts, and no text
        "minicpm",  # scaled residuals and logits
        "phi3_longrope",  # the rope depends on the prompt's length
        "phi3small",  # blocksparse attention
        "xverse_moe",  # experts
    )
]
SMALL = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,  # torch's own is so small that every logit is nearly zero
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = cli.main(["verify", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ---- stored outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_goldens_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, str(folder), "--golden", "golden.npz")
    assert code == 0 and found["passes"]
    assert len(found["stages"]) == 3
    for stage in found["stages"]:
        assert stage["logits"]["max"] < 2e-4
        assert stage["layers"]
    with np.load(folder / "golden.npz") as arrays:
        assert found["stages"][2]["steps"] == arrays["lengths"].max()
        if "greedy" not in arrays:  # a model that reads texts
            assert len(found["read"]) == len(arrays["lengths"])
            assert all(result["difference"] < 2e-4 for result in found["read"])
            return
        assert [g["tokens"] for g in found["greedy"]] == [16] * len(arrays["lengths"])
    assert all(g["equal"] == 16 for g in found["greedy"])


def test_a_mesh_passes_in_a_process_of_its_own() -> None:
    """The number of CPU devices is fixed when JAX starts, which must not be before it is set."""
    folder = ROOT / "tests" / "goldens" / "mistral-a"
    command = f"verify {folder} --golden golden.npz --device cpu --tp-size 2 --dp-size 2 --json"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tp 2, dp 2" in json.loads(done.stdout)["engine"]


def test_a_rope_that_grows_is_compared_beyond_the_length_it_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((ROOT / "tests" / "goldens" / "internlm2-a" / "config.json").read_text())
    config |= {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    made, prompts = formulas.Checkpoint(), [[5, 9, 200], list(range(3, 43))]
    logits = [formulas.internlm2(config, made, prompt) for prompt in prompts]
    arrays = {"input_ids": np.zeros((2, 40), np.int32), "logits": np.zeros((2, 40, 259))}
    for row, (prompt, rows) in enumerate(zip(prompts, logits, strict=True)):
        arrays["input_ids"][row, : len(prompt)] = prompt
        arrays["logits"][row, : len(prompt)] = rows
    arrays["lengths"] = np.array([3, 40], np.int32)
    arrays["greedy"] = np.array([[rows[-1].argmax()] for rows in logits], np.int32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(made.tensors, tmp_path / "model.safetensors")
    np.savez(tmp_path / "golden.npz", **arrays)
    code, found = run_json(capsys, str(tmp_path), "--golden", "golden.npz")
    assert code == 0 and found["passes"]
    with pytest.raises(ConfigError, match="--context-length is 41"):
        plain = {**config, "rope_scaling": None}
        (tmp_path / "config.json").write_text(json.dumps(plain))
        verify(EngineConfig(model_path=str(tmp_path)), VerifyOptions(golden=Path("golden.npz")))


def test_a_wrong_layer_logit_and_token_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ROOT / "tests" / "goldens" / "gemma3-a"
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    with np.load(source / "golden.npz") as stored:
        arrays = {name: stored[name].copy() for name in stored}
    arrays["layer_out"][1:, 5] += 0.1
    arrays["logits"][3, 20, 7] += 0.01
    arrays["greedy"][1, 4] += 1
    np.savez(folder / "golden.npz", **arrays)

    code, found = run_json(capsys, str(folder), "--golden", "golden.npz")
    assert code == 1 and not found["passes"]
    for stage in found["stages"]:
        assert stage["logits"]["max"] == pytest.approx(0.01, abs=1e-4)
        assert (stage["logits"]["prompt"], stage["logits"]["position"]) == ("3", 20)
        assert [layer["max"] > 0.05 for layer in stage["layers"]] == [False, True, True]
        assert stage["layers"][1]["position"] == 5
    assert [g["equal"] for g in found["greedy"]] == [16, 4, 16, 16]

    assert cli.main(["verify", str(folder), "--golden", str(folder / "golden.npz")]) == 1
    text = capsys.readouterr().out
    assert "first bad layer of 'prefill in one step': 1" in text
    assert "DIFFERS from token 4" in text
    assert text.endswith("FAIL\n")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"scores": np.zeros((1, 2))}, "lacks input_ids, lengths; it holds scores"),
        ({"embeddings": np.zeros((1, 2))}, "lacks input_ids, lengths; it holds embeddings"),
        ({"input_ids": np.zeros((1, 2))}, "lacks lengths, logits, greedy"),
    ],
)
def test_files_without_a_generating_models_outputs_are_refused(
    tmp_path: Path, arrays: dict, message: str
) -> None:
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(VerifyError, match=message):
        read_golden(tmp_path / "golden.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "golden.npz").write_bytes(b"something else")
    with pytest.raises(VerifyError, match=r"cannot be read as an \.npz"):
        read_golden(tmp_path / "golden.npz")


def test_a_missing_file_is_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(GOLDENS[0]), "--golden", "nowhere.npz"]) == 1
    assert "neither nowhere.npz nor" in capsys.readouterr().err


def test_no_model_is_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 1
    assert "jaxserve verify MODEL" in capsys.readouterr().err


def test_cached_greedy_tokens_are_preferred() -> None:
    file = ROOT / "tests" / "goldens" / "phi3_longrope-a" / "golden.npz"
    references = read_golden(file, max_new_tokens=12)
    with np.load(file) as arrays:
        assert [r.greedy for r in references] == arrays["greedy_cached"][:, :12].tolist()
    assert all(r.margins is None for r in references)
    assert [r.layers is not None for r in references] == [False, False, True, False, False]


# ---- transformers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, make_byte_tokenizer: Callable[..., Path]
) -> Path:
    """A random checkpoint whose context is shorter than the built-in prompts."""
    folder = make_byte_tokenizer(tmp_path_factory.mktemp("small"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def test_a_checkpoint_agrees_with_transformers(small: Path) -> None:
    result = verify(EngineConfig(str(small), dtype="float32"), VerifyOptions(max_new_tokens=8))
    assert result.passes
    assert list(result.prompts) == ["plain", "chat", "long", "code", "unicode"]
    assert max(result.prompts.values()) == SMALL["max_position_embeddings"] - 8
    assert all(stage.logits.max < 1e-3 and len(stage.layers) == 2 for stage in result.stages)
    assert [g.num_tokens for g in result.greedy] == [8] * 5


def test_no_room_for_a_prompt_is_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(small), "--max-new-tokens", "160"]) == 1
    assert "--max-new-tokens 160 leaves no room" in capsys.readouterr().err


def test_the_reference_is_consistent_with_itself(small: Path) -> None:
    model = hf_reference.load_reference(small)
    prompt = [72, 101, 108, 108, 111]
    cached = hf_reference.greedy(model, prompt, 6)
    assert hf_reference.greedy(model, prompt, 6, use_cache=False).tokens == cached.tokens
    at_once = hf_reference.forward(model, prompt + cached.tokens)
    assert at_once.logits.shape == (11, SMALL["vocab_size"])
    assert at_once.layers.shape == (2, 11, SMALL["hidden_size"])
    assert at_once.logits[4:10].argmax(-1).tolist() == cached.tokens
    best = np.sort(at_once.logits[4:10])
    np.testing.assert_allclose(cached.margins, best[:, -1] - best[:, -2], atol=1e-5)
    rounding = hf_reference.rounding(model, prompt + cached.tokens, at_once.logits)
    assert rounding.shape == (11,) and 0 < rounding.max() < 1e-3
    again = hf_reference.forward(model, prompt + cached.tokens)  # the nudge is gone
    np.testing.assert_array_equal(again.logits, at_once.logits)


def test_the_reference_chooses_between_equal_logits_as_transformers_does(small: Path) -> None:
    model = hf_reference.load_reference(small)
    best = model.lm_head.weight.detach()[[100]]
    model.lm_head.weight.data[:] = 0.0
    model.lm_head.weight.data[[20, 100, 200]] = best  # equal logits, in 16 bits a common case
    for prompt in ([72, 101], [108, 108, 111]):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        written = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        found = hf_reference.greedy(model, prompt, 4)
        assert found.tokens == written
        assert found.margins == [0.0] * 4


def test_the_reference_can_be_timed(small: Path) -> None:
    timer = hf_reference.HFTimer(small)
    assert timer.seconds([[1, 2, 3], [4, 5, 6]], 1) > 0
    assert timer.seconds([[1, 2, 3], [4, 5, 6]], 4) > 0


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_model_agrees_with_transformers(
    demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers reads the GGUF file with its own code."""
    code, found = run_json(
        capsys, str(demo_model), "--prompts", "2", "--max-new-tokens", "16", "--tolerance", "1e-3"
    )
    assert code == 0 and found["passes"]


BFLOAT16_STEP = 0.125  # between two numbers of the size of these models' best logits


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "gemma-270m"])
def test_real_models_write_in_bfloat16_what_transformers_writes_in_it(name: str) -> None:
    """16 tokens each. Where its two best logits are neighbours or equal, chance decides in both.

    After such a place ours goes on from the tokens of transformers, so that all 16 are compared.
    """
    model = hf_reference.load_reference(name, "bfloat16")
    with LLM(name, dtype="bfloat16", device="cpu", context_length=256, show_progress=False) as llm:
        prompts = list(make_prompts(llm.tokenizer, 200, 5).values())
        theirs = [hf_reference.greedy(model, prompt, 16) for prompt in prompts]

        def differing(given: list[int]) -> list[int]:
            """Where each text differs first after `given` tokens of it; 16: nowhere."""
            texts = [p + one.tokens[:n] for p, one, n in zip(prompts, theirs, given, strict=True)]
            sampling = [
                SamplingParams(temperature=0, max_tokens=max(16 - n, 1), ignore_eos=True)
                for n in given
            ]
            places = []
            for written, one, n in zip(llm.generate(texts, sampling), theirs, given, strict=True):
                pairs = enumerate(zip(written.token_ids, one.tokens[n:], strict=False), n)
                places.append(next((i for i, (ours, its) in pairs if ours != its), 16))
            return places

        places = differing([0] * len(prompts))
        assert places.count(16) >= 3  # of 5 texts, from the first token to the last
        while min(places) < 16:
            for place, one in zip(places, theirs, strict=True):
                assert place == 16 or one.margins[place] <= BFLOAT16_STEP
            places = differing([min(place + 1, 16) for place in places])


def test_help_loads_neither_jax_nor_torch() -> None:
    code = (
        "import sys, jaxserve.cli as cli\n"
        "for command in ('verify', 'show', 'models'):\n"
        "    try: cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(str({'jax', 'torch'} & set(sys.modules)) if {'jax', 'torch'} & set(sys.modules)"
        " else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- comparing ------------------------------------------------------------------------------


def test_a_tally_finds_the_largest_difference() -> None:
    tally = Tally()
    theirs = np.arange(12, dtype=np.float32).reshape(3, 4)
    tally.add(theirs, theirs, "a", 0)
    moved = theirs.copy()
    moved[1, 2] -= 0.5
    tally.add(moved, theirs, "b", 10)
    found = tally.result()
    assert found is not None
    assert (found.max, found.prompt, found.position) == (0.5, "b", 11)
    assert found.mean == pytest.approx(0.5 / 24)
    assert found.std == pytest.approx(np.concatenate([theirs, theirs]).std())
    assert found.relative == pytest.approx(0.5 / found.std)


def test_nan_is_an_infinite_difference_and_never_passes() -> None:
    tally = Tally()
    theirs = np.ones((2, 3), np.float32)
    ours = theirs.copy()
    ours[1, 0] = np.nan
    tally.add(ours, theirs, "a", 0)
    tally.add(theirs, theirs, "b", 0)
    found = tally.result()
    assert found is not None
    assert found.max == np.inf and (found.prompt, found.position) == ("a", 1)
    stage = StageResult("stage", 1, found, (found,))
    assert not stage.passes(1e9) and stage.bad_layers(1e9) == [0]
    whole = Report("m", "r", "e", 1e-3, {"a": 2}, (stage,), ())
    assert not whole.passes
    assert report.to_json(whole)["stages"][0]["logits"]["max"] is None
    json.dumps(report.to_json(whole), allow_nan=False)


def test_nothing_compared_has_no_difference() -> None:
    assert Tally().result() is None


@pytest.mark.parametrize(
    ("tokens", "margins", "equal", "passes"),
    [
        ([5, 6, 7], [1.0, 1.0, 1.0], 3, True),
        ([5, 9, 7], [1.0, compare.TIE_MARGIN / 2, 1.0], 1, True),  # the reference was undecided
        ([5, 9, 7], [1.0, compare.TIE_MARGIN * 2, 0.0], 1, False),
        ([5, 9, 7], None, 1, False),
        ([5, 6], [1.0, 1.0, 0.5], 2, False),  # too short
    ],
)
def test_greedy_tokens_may_differ_only_at_a_tie(
    tokens: list[int], margins: list[float] | None, equal: int, passes: bool
) -> None:
    reference = Reference("a", [1], np.zeros((1, 4)), None, [5, 6, 7], margins)
    result = compare_greedy(reference, tokens)
    assert (result.num_equal, result.passes) == (equal, passes)


def test_a_tie_is_named_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    tally.add(np.zeros((1, 2)), np.ones((1, 2)), "a", 0)
    difference = tally.result()
    assert difference is not None
    stage = StageResult("stage", 1, difference, ())
    tie = GreedyResult("a", 64, 12, 5e-4)
    report.print_report(Report("m", "r", "e", 2.0, {"a": 1}, (stage,), (tie,)))
    text = capsys.readouterr().out
    assert "top-2 margin 5.0e-04 < 0.001: a tie, accepted" in text
    assert text.endswith("PASS\n")
