"""`jaxserve bench latency|throughput`: batches of requests, all submitted at once.

What is timed is the whole call, from the first request's submission to the last one's last token,
with greedy sampling, no end token and random prompts: nothing depends on what is generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from dataclasses import dataclass

from jaxserve.bench.peers import PeerModel, Peers, load_peers
from jaxserve.bench.serve import Load, serve_in_process
from jaxserve.bench.session import Budget, Session
from jaxserve.bench.workloads import DEFAULT_CASES, Workload, parse_cases
from jaxserve.config import ConfigError, EngineConfig, from_args
from jaxserve.engine.engine import Engine
from jaxserve.log import ProgressDisplay
from jaxserve.request import SamplingParams

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.25  # between updates of the progress bar


def run(args: argparse.Namespace) -> int:
    """Measure the cases or the suite that `args` names; a JSON line each, then tables."""
    peers = load_peers()
    suite = peers.suites[args.suite] if args.suite else None
    if suite is not None:
        use_suite(args, suite, peers)
    if args.cases:
        parse_cases(args.cases)  # a mistake is told before the model is loaded
    with Session(from_args(EngineConfig, args), args) as session:
        workloads = choose_cases(args, session.engine, suite)
        session.warm_up()
        for workload in workloads:
            measure(session, workload, args.repeats or 1, args.seed)
        if suite is not None and suite.serve:
            serve_in_process(session, Load(seed=args.seed), list(map(float, suite.serve)))
    return 0


def use_suite(args: argparse.Namespace, suite: PeerModel, peers: Peers) -> None:
    """Make the suite's settings those of this run, except where a flag says otherwise.

    Raises:
        ConfigError: --cases is given too.
    """
    if args.cases:
        raise ConfigError("--suite and --cases were both given; give one")
    if args.model_path is None:
        args.model_path = suite.config
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    for name, value in peers.settings.items():
        if getattr(args, name) == defaults[name]:
            setattr(args, name, value)


def choose_cases(
    args: argparse.Namespace, engine: Engine, suite: PeerModel | None
) -> list[Workload]:
    """The workloads to measure.

    Raises:
        ConfigError: one has a request longer than the context.
    """
    kind = "cpu" if engine.model_info.platform == "cpu" else "accelerator"
    text = ",".join(suite.seconds) if suite else args.cases or DEFAULT_CASES[args.kind][kind]
    cases, context = parse_cases(text), engine.model_info.max_model_len
    for case in cases:
        if case.longest > context:
            raise ConfigError(
                f"{case.name} has a request of {case.longest} tokens, the context is {context}. "
                "Raise --context-length or choose other --cases."
            )
    return cases


@dataclass(frozen=True)
class Timing:
    """One run of a workload; `bucket_tokens` counts the steps' padding too."""

    seconds: float
    steps: int
    tokens: int
    bucket_tokens: int


def measure(session: Session, workload: Workload, repeats: int, seed: int) -> None:
    """Run a workload `repeats` times and report the median run."""
    vocab = session.engine.model_info.vocab_size
    timings: list[Timing] = []
    for repeat in range(repeats):
        if session.budget.is_spent:
            break
        prompts = workload.prompts(vocab, seed + repeat)
        timing = time_batch(session.engine, workload, prompts, session.budget, session.progress)
        if timing is None:
            break
        timings.append(timing)
    if not timings:
        session.report.not_run.append(workload.name)
        return
    timings.sort(key=lambda timing: timing.seconds)
    _report(session, workload, timings[(len(timings) - 1) // 2], len(timings))


def time_batch(
    engine: Engine,
    workload: Workload,
    prompts: list[list[int]],
    budget: Budget,
    progress: ProgressDisplay,
) -> Timing | None:
    """Run a workload once, as fast as it goes; None when the budget ends before it does."""
    sampling = {
        num_output: SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        for _, num_output in workload.lengths
    }
    before, total = engine.scheduler.stats, workload.num_requests
    start_s = told_s = time.perf_counter()
    requests = [
        engine.add(prompt, sampling[num_output], f"bench-{index}")
        for index, (prompt, (_, num_output)) in enumerate(
            zip(prompts, workload.lengths, strict=True)
        )
    ]
    num_finished = 0
    while engine.has_work:
        num_finished += sum(request.is_finished for request in engine.step())
        if time.perf_counter() - told_s > REPORT_INTERVAL_S:
            told_s = time.perf_counter()
            progress(workload.name, num_finished, total)
            if budget.is_spent:
                for request in requests:
                    engine.abort(request.id)
                while engine.has_work:
                    engine.step()
                logger.warning("%s was cut: %d of %d done", workload.name, num_finished, total)
                return None
    seconds = time.perf_counter() - start_s
    progress(workload.name, num_finished, total)
    for request, (_, num_output) in zip(requests, workload.lengths, strict=True):
        assert request.num_output == num_output, "a request did not get what it asked for"
    after = engine.scheduler.stats
    return Timing(
        seconds,
        after.total_steps - before.total_steps,
        after.total_tokens - before.total_tokens,
        after.total_bucket_tokens - before.total_bucket_tokens,
    )


def _report(session: Session, workload: Workload, timing: Timing, num_runs: int) -> None:
    seconds, peer = timing.seconds, session.peer
    rates = {
        "output_tok_s": None if workload.is_prefill else workload.output_tokens / seconds,
        "prefill_tok_s": workload.input_tokens / seconds if workload.is_prefill else None,
        "req_s": workload.num_requests / seconds,
    }
    session.report.add(
        "batches",
        workload.name,
        {
            "s": seconds,
            "out tok/s": rates["output_tok_s"],
            "prefill tok/s": rates["prefill_tok_s"],
            "req/s": rates["req_s"],
            "steps": timing.steps,
            "padding": f"{1 - timing.tokens / timing.bucket_tokens:.0%}",
        },
        {
            "requests": workload.num_requests,
            "input_tokens": workload.input_tokens,
            "output_tokens": workload.output_tokens,
            "seconds": seconds,
            "runs": num_runs,
            **rates,
            "steps": timing.steps,
            "step_tokens": timing.tokens,
            "bucket_tokens": timing.bucket_tokens,
        },
        peers_s=peer.seconds.get(workload.name) if peer else None,
    )
