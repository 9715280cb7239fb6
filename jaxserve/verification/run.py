"""`verify`: the reference first, then the same prompts through an engine, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from converters.checkpoint import open_checkpoint
from converters.interface import Checkpoint, Progress
from jaxserve.config import ConfigError, EngineConfig, configure_jax, user_cache_dir
from jaxserve.engine.engine import Engine, load_tokenizer
from jaxserve.engine.task import family_and_spec
from jaxserve.request import SamplingParams
from jaxserve.scheduler.buckets import Bucket
from jaxserve.verification.compare import (
    GreedyResult,
    ReadResult,
    Report,
    StageResult,
    Tally,
    compare_greedy,
    compare_read,
)
from jaxserve.verification.reference import (
    NUM_PROMPTS,
    Reference,
    VerifyError,
    make_prompts,
    read_golden,
)
from jaxserve.verification.replay import replay
from model_defs.registry import family_of

HF_TOLERANCE, GOLDEN_TOLERANCE = 1e-3, 2e-4
MAX_CHUNK = 128  # tokens of a prefill chunk: the long prompt has several
OUTPUTS = {"generate": "Logits", "score": "Scores", "embed": "Final hidden states"}
SMALL_PAGE = 16  # for prompts that would not fill a page of the platform's own size


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare; None chooses what fits the kind of reference.

    Attributes:
        golden: file of stored outputs, or of that name in the model's folder; None: transformers.
        num_prompts: how many of the prompts.
        tolerance: of logits, absolute.
    """

    golden: Path | None = None
    num_prompts: int | None = None
    max_new_tokens: int = 64
    tolerance: float | None = None


def verify(
    config: EngineConfig, options: VerifyOptions, progress: Progress | None = None
) -> Report:
    """Compare a model's outputs with a reference's.

    Raises:
        VerifyError: there is nothing to compare with.
        CheckpointError, UnsupportedConfig, ConfigError: the model cannot be loaded.
    """
    seconds: dict[str, float] = {}
    checkpoint = open_checkpoint(
        config.model_path, config.revision, config.download_dir or user_cache_dir(), progress
    )
    references, source = [], ""
    if options.golden is not None:
        file = _golden_file(options.golden, checkpoint)
        references = read_golden(file, options.num_prompts, options.max_new_tokens)
        source = f"stored outputs in {file.name}"
        if references[0].task == "embed":
            config = dataclasses.replace(config, is_embedding=True)
    _, spec = family_and_spec(config, checkpoint)  # refused before anything is computed
    if options.golden is None and spec.task != "generate":
        raise VerifyError(
            f"{checkpoint.config['architectures'][0]} is served to {spec.task} texts; such models "
            "are compared with stored outputs only. Name a file of them with --golden."
        )
    if references and references[0].task != spec.task:
        raise VerifyError(
            f"the stored outputs are for the task {references[0].task!r}, but "
            f"{checkpoint.config['architectures'][0]} is served for {spec.task!r}. Give the "
            "golden.npz that belongs to this model."
        )
    with _timed("reference", seconds):
        if options.golden is None:
            references, source = _run_transformers(config, options, checkpoint, progress)
    configure_jax(config)  # before the backend is looked at: that starts JAX
    if jax.default_backend() != "cpu" and config.dtype == "float32":
        # Accelerators round the inputs of float32 products by default; the reference does not.
        jax.config.update("jax_default_matmul_precision", "highest")
    with _timed("engine", seconds):
        engine = Engine(
            _engine_config(config, references), progress=progress, needs_tokenizer=False
        )
    with contextlib.closing(engine):
        stages = tuple(
            _compare_stage(engine, references, stage, progress, seconds)
            for stage in _stages(engine, references)
        )
        greedy: tuple[GreedyResult, ...] = ()
        read: tuple[ReadResult, ...] = ()
        if spec.task == "generate":
            with _timed("greedy", seconds):
                greedy = _compare_greedy(engine, references, progress)
        else:
            with _timed("texts", seconds):
                read = _compare_read(engine, references)
        info = engine.model_info
    default = HF_TOLERANCE if options.golden is None else GOLDEN_TOLERANCE
    return Report(
        model=f"{config.model_path} ({info.architecture}, {info.num_parameters:,} parameters)",
        reference=source,
        engine=f"{info.dtype} on {info.platform}, tp {info.tp_size}, dp {info.dp_size}, pages of "
        f"{info.page_size} tokens",
        tolerance=default if options.tolerance is None else options.tolerance,
        prompts={reference.name: len(reference.tokens) for reference in references},
        stages=stages,
        greedy=greedy,
        seconds=seconds,
        read=read,
        outputs=OUTPUTS[spec.task],
    )


# ---- the reference --------------------------------------------------------------------------


def _run_transformers(
    config: EngineConfig,
    options: VerifyOptions,
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> tuple[list[Reference], str]:
    """Run the prompts through transformers in float32."""
    hf = importlib.import_module("jaxserve.hf_reference")  # only here: torch may be absent
    tokenizer = load_tokenizer(config, checkpoint)
    longest = family_of(checkpoint.config).spec(checkpoint.config).max_length
    if config.context_length is not None:
        longest = min(longest, config.context_length)
    max_prompt = longest - options.max_new_tokens
    if max_prompt < 1:
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt in a context "
            f"of {longest} tokens. Lower it."
        )
    count = NUM_PROMPTS if options.num_prompts is None else options.num_prompts
    prompts = make_prompts(tokenizer, max_prompt, count)
    model = hf.load_reference(checkpoint)
    references = []
    for name, ids in prompts.items():
        at_once = hf.forward(model, ids)
        greedy = hf.greedy(model, ids, options.max_new_tokens)
        references.append(
            Reference(
                name,
                ids,
                at_once.logits,
                at_once.layers,
                greedy.tokens,
                greedy.margins,
                hf.rounding(model, ids, at_once.logits),
            )
        )
        if progress is not None:
            progress("running the reference", len(references), len(prompts))
    return references, f"{hf.VERSIONS}, float32, eager attention"


def _golden_file(file: Path, checkpoint: Checkpoint) -> Path:
    beside = checkpoint.path / file
    found = next((path for path in (file, beside) if path.is_file()), None)
    if found is None:
        raise VerifyError(f"--golden: neither {file} nor {beside} is a file.")
    return found


# ---- the engine -----------------------------------------------------------------------------


def _engine_config(config: EngineConfig, references: Sequence[Reference]) -> EngineConfig:
    """Settings with which the prompts cross pages and chunks; what the user set stays."""
    longest = max(len(r.tokens) for r in references)
    context = max(len(r.tokens) + len(r.greedy) for r in references)
    chunk = max(len(references), min(MAX_CHUNK, longest // 4))
    defaults = {
        "context_length": max(context, longest + 1),
        "max_running_requests": len(references),
        "chunked_prefill_size": chunk,
        "page_size": SMALL_PAGE if longest < 2 * MAX_CHUNK else None,
    }
    chosen = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **chosen)


@dataclass(frozen=True)
class Stage:
    """A way of computing the prompts: in what steps."""

    name: str
    bucket: Bucket
    one_by_one: bool = False


def _stages(engine: Engine, references: Sequence[Reference]) -> tuple[Stage, ...]:
    if any(r.logits is None for r in references):
        return ()
    longest, rows = max(len(r.tokens) for r in references), engine.runner.max_rows
    chunk = max(rows, min(MAX_CHUNK, longest // 4))
    return (
        Stage("prefill in one step", Bucket(longest, 1)),
        Stage(f"chunks of up to {chunk}, rows mixed", Bucket(chunk, rows)),
        Stage("one token at a time", Bucket(rows, rows), one_by_one=True),
    )


def _compare_stage(
    engine: Engine,
    references: Sequence[Reference],
    stage: Stage,
    progress: Progress | None,
    seconds: dict[str, float],
) -> StageResult:
    logits, layers = Tally(), [Tally() for _ in engine.runner.model.spec.layers]
    total = sum(len(r.tokens) for r in references)
    num_steps, done = 0, 0
    with _timed(stage.name, seconds):
        prompts = [r.tokens for r in references]
        for pieces in replay(engine.runner, prompts, stage.bucket, one_by_one=stage.one_by_one):
            num_steps += 1
            for piece in pieces:
                reference = references[piece.prompt]
                assert reference.logits is not None, "without them there are no stages"
                part = slice(piece.start, piece.start + len(piece.logits))
                logits.add(piece.logits, reference.logits[part], reference.name, piece.start)
                if reference.layers is not None:
                    for tally, ours, theirs in zip(
                        layers, piece.layers, reference.layers, strict=True
                    ):
                        tally.add(ours, theirs[part], reference.name, piece.start)
                done += len(piece.logits)
            if progress is not None:
                progress(stage.name, done, total)
    result = logits.result()
    assert result is not None and done == total, "the scheduler left tokens out"
    by_layer = (tally.result() for tally in layers)
    (worst,) = (r for r in references if r.name == result.prompt)
    return StageResult(
        name=stage.name,
        num_steps=num_steps,
        logits=result,
        layers=tuple(d for d in by_layer if d is not None),
        rounding=None if worst.rounding is None else float(worst.rounding[result.position]),
    )


def _compare_greedy(
    engine: Engine, references: Sequence[Reference], progress: Progress | None
) -> tuple[GreedyResult, ...]:
    """Generate for all prompts together, as a server does, once every bucket is compiled."""
    engine.wait_until_warm()
    requests = []
    for reference in references:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=len(reference.greedy), ignore_eos=True
        )
        requests.append(engine.add(reference.tokens, sampling, reference.name))
    total = sum(len(reference.greedy) for reference in references)
    while engine.has_work:
        engine.step()
        if progress is not None:
            progress("generating", sum(r.num_output for r in requests), total)
    return tuple(
        compare_greedy(reference, request.tokens[request.num_prompt :])
        for reference, request in zip(references, requests, strict=True)
    )


def _compare_read(engine: Engine, references: Sequence[Reference]) -> tuple[ReadResult, ...]:
    """Read all texts together, as a server does, once every bucket is compiled."""
    engine.wait_until_warm()
    requests = [engine.add(reference.tokens, None, reference.name) for reference in references]
    while engine.has_work:
        engine.step()
    pairs = zip(references, requests, strict=True)
    return tuple(compare_read(reference, request.result) for reference, request in pairs)


@contextlib.contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start_s
