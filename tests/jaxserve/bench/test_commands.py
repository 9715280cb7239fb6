"""`jaxserve bench` on a tiny model of random weights: what is printed, and what is left out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxserve import cli
from jaxserve.bench import report
from jaxserve.bench.command import add_arguments
from jaxserve.bench.offline import use_suite
from jaxserve.bench.peers import load_peers
from jaxserve.bench.serve import Record, summary
from jaxserve.config import EngineConfig, from_args

ROOT = Path(cli.__file__).parents[1]
FACTS = {"device", "platform", "python", "jax", "jaxlib", "flax", "jaxserve", "commit", "command"}
WITHOUT = ("fastapi", "uvicorn", "pydantic", "transformers", "torch", "httpx")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags of a tiny model that is made of a config alone, and compiles one bucket."""
    source = Path(load_peers().suites["h100-llama"].config)
    config = json.loads(source.read_text()) | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 200,
        "max_position_embeddings": 256,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    flags = ["--device", "cpu", "--skip-background-compile", "--max-running-requests", "4"]
    return ["--model", str(path), "--load-format", "dummy", *flags, "--page-size", "16"]


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, dict], str]:
    """The JSON lines by case, and the rest."""
    said = capsys.readouterr()
    results = [json.loads(line) for line in said.out.splitlines()]
    assert all(result.keys() >= FACTS for result in results)
    return {result["case"]: result for result in results}, said.err


def test_batches_are_timed(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["--cases", "1x16/8,6x20/1,3x9/5", "--repeats", "3"]
    assert cli.main(["bench", "latency", *tiny, *cases]) == 0
    results, told = lines(capsys)
    assert list(results) == ["startup", "1x16/8", "6x20/1", "3x9/5"]
    start = results["startup"]
    assert 0 < start["ready_s"] <= start["all_buckets_s"] == start["seconds"]
    one, prefill, three = (results[name] for name in list(results)[1:])
    assert (one["requests"], one["input_tokens"], one["output_tokens"]) == (1, 16, 8)
    assert one["runs"] == 3
    assert one["output_tok_s"] == pytest.approx(8 / one["seconds"])
    assert (prefill["output_tok_s"], one["prefill_tok_s"]) == (None, None)
    assert prefill["prefill_tok_s"] == pytest.approx(120 / prefill["seconds"])
    assert three["req_s"] == pytest.approx(3 / three["seconds"])
    assert (one["steps"], one["step_tokens"]) == (8, 23)  # a token more than the cache needs
    assert one["bucket_tokens"] == 8 * 512  # there is one bucket
    assert one["settings"]["load_format"] == "dummy"
    assert one["settings"]["max_running_requests"] == 4
    for name in ("batches", "1x16/8", "out tok/s", "99%"):
        assert name in told


def test_peers_stand_beside_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    peer = load_peers().suites["h100-llama"]
    told = report.Report({}, peer)
    told.add("batches", "8x128/128", {"s": 0.8}, {"seconds": 0.8}, peers_s={"vLLM": 0.868})
    told.close()
    results, table = lines(capsys)
    assert results["8x128/128"]["peers_s"] == {"vLLM 0.24.0": 0.868}
    assert "ratio" not in results["8x128/128"], "another device is no comparison"
    assert all(text in table for text in ("vLLM s", "0.868", "NVIDIA H100 80GB HBM3"))


def test_a_ratio_is_told_on_the_card_of_the_peers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = report.environment() | {"device": load_peers().card}
    monkeypatch.setattr(report, "environment", lambda: facts)
    told = report.Report({}, load_peers().suites["h100-llama"])
    told.add("batches", "8x128/128", {}, {"seconds": 0.5}, peers_s={"vLLM": 1.0, "SGLang": 0.8})
    results, _ = lines(capsys)
    assert results["8x128/128"]["ratio"] == 1.6


def test_what_does_not_fit_the_budget_is_named(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = ["--cases", "1x16/8,3x9/5", "--budget-s", "0.001"]
    assert cli.main(["bench", "throughput", *tiny, *cases]) == 0
    results, told = lines(capsys)
    assert list(results) == ["startup"]
    assert "not run: 1x16/8, 3x9/5" in told


def test_a_case_is_cut_when_the_budget_ends(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.bench.offline.REPORT_INTERVAL_S", 0.0)
    left = iter([1.0, 1.0, 0.0])  # before the case, at its first step, at its second
    monkeypatch.setattr("jaxserve.bench.session.Budget.left_s", property(lambda _: next(left)))
    assert cli.main(["bench", "latency", *tiny, "--cases", "3x9/5"]) == 0
    results, told = lines(capsys)
    assert list(results) == ["startup"]
    assert "3x9/5 was cut: 0 of 3 done" in told
    assert "not run: 3x9/5" in told


def test_arrivals_are_served_in_process(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--num-requests", "6", "--input-tokens", "9", "--output-tokens", "4"]
    rates = ["--request-rate", "100", "inf"]
    assert cli.main(["bench", "serve", *tiny, *load, *rates]) == 0
    results, told = lines(capsys)
    assert list(results) == ["startup", "serve 100/s", "serve inf/s"]
    for name in ("serve 100/s", "serve inf/s"):
        result = results[name]
        assert result["req_s"] == pytest.approx(6 / result["seconds"], rel=0.01)
        assert result["out_tok_s"] == pytest.approx(24 / result["seconds"], rel=0.01)
        assert 0 < result["ttft_ms"] <= result["ttft_p99_ms"]
        assert result["tpot_ms"] <= result["tpot_p99_ms"]
    assert "serve, 6x9/4" in told


def test_the_summary_counts_from_first_to_last() -> None:
    records = [Record(1.0, [1.5, 1.5, 2.0, 2.5]), Record(2.0, [2.1, 2.3, 2.5, 3.0])]
    facts = summary(records)
    assert (facts["seconds"], facts["req_s"], facts["out_tok_s"]) == (2.0, 1.0, 4.0)
    assert facts["ttft_ms"] == 300.0
    assert facts["tpot_ms"] == pytest.approx((1000 / 3 + 300) / 2, abs=1e-3)
    assert facts["itl_ms"] == 500.0  # of 0.5, 0.5 and 0.2, 0.2, 0.5


def test_host_cost_grows_with_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "host", "--rows", "1", "64", "--repeats", "20"]) == 0
    results, _ = lines(capsys)
    assert list(results) == [
        f"{kind} {num} rows" for kind in ("decode", "mixed") for num in (1, 64)
    ]
    assert results["decode 64 rows"]["tokens a step"] == 64
    assert results["mixed 64 rows"]["tokens a step"] > 64
    for result in results.values():
        parts = sum(result[f"{part} us"] for part in ("schedule", "pack", "update"))
        assert parts == pytest.approx(result["total us"], rel=0.5)
    assert results["decode 64 rows"]["total us"] < 64 * results["decode 1 rows"]["total us"]


def test_offline_benchmarks_need_no_web_framework_and_no_tokenizer(tiny: list[str]) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({WITHOUT!r}))\n"
        "from jaxserve import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    for kind in (["latency", "--cases", "1x4/2"], ["serve", "--num-requests", "2"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "bench", *kind, *tiny, "--context-length", "256"]
            + (["--input-tokens", "4", "--output-tokens", "2"] if kind[0] == "serve" else []),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "startup" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--cases", "8x9"], "error: --cases: '8x9' is no case"),
        (["latency", "--cases", "1x300/1"], "error: 1x300/1 has a request of 301 tokens"),
        (["latency", "--suite", "h100-llama", "--cases", "1x1/1"], "error: --suite and --cases"),
        (["throughput", "--output-tokens", "3"], "error: --output-tokens belongs to --hf"),
        (["throughput", "--hf", "--cases", "1x1/1"], "error: --hf has its own cases"),
        (["throughput", "--hf"], "error: --load-format dummy: transformers loads"),
        (["serve", "--url", "http://127.0.0.1:9"], "error: --url names a server that runs"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    arguments: list[str], message: str, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments, *tiny, "--log-level", "error"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:9", "error: --url is '127.0.0.1:9'; give a server's address"),
        ("http://127.0.0.1:9", "error: no server answers at http://127.0.0.1:9"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(
    url: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jax.devices()  # asked for before the server is
    assert cli.main(["bench", "serve", "--url", url]) == 1
    assert capsys.readouterr().err.startswith(message)


def test_a_suite_fills_in_what_is_left_open(tiny: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    peers = load_peers()
    suite = peers.suites["h100-llama"]
    args = parser.parse_args(["latency", "--suite", "h100-llama", "--context-length", "2048"])
    use_suite(args, suite, peers)
    config = from_args(EngineConfig, args)
    assert config.model_path == suite.config
    assert (config.load_format, config.dtype) == ("dummy", "bfloat16")
    assert config.max_running_requests == 256
    assert config.context_length == 2048, "what a flag says stays"
    args = parser.parse_args(["throughput", "--suite", "h100-llama", *tiny])
    use_suite(args, suite, peers)
    assert (args.model_path, args.max_running_requests) == (tiny[1], 4)
