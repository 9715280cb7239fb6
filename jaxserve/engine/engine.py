"""The engine: a scheduler, a runner, and the loop between them.

One thread drives it. With overlap (the default) a step is dispatched before the results of the
one before it are read:

    host    schedule n+1 | dispatch n+1 | read n, update | schedule n+2 | ...
    device  ...... step n ............. | ...... step n+1 ...............
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from converters.checkpoint import open_checkpoint, open_config
from converters.interface import Checkpoint, Progress
from jaxserve.config import ConfigError, EngineConfig, configure_jax, user_cache_dir
from jaxserve.engine.compile_counter import CompileCounter
from jaxserve.engine.dummy import dummy_params
from jaxserve.engine.kv_cache import StepMemory, memory_budget_bytes, pages_that_fit
from jaxserve.engine.loader import (
    build_model,
    dtype_of,
    load_params,
    params_bytes_per_device,
)
from jaxserve.engine.reading import finish_read, keep_read
from jaxserve.engine.runner import InFlight, Runner
from jaxserve.engine.step_store import StepStore
from jaxserve.engine.task import family_and_spec, log_embedding
from jaxserve.engine.warmup import BackgroundCompiler, large_stack_pool
from jaxserve.request import NO_SAMPLING, InvalidRequest, Request, SamplingParams
from jaxserve.scheduler.buckets import Bucket, make_buckets
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.tokenizer import NoTokenizer, Tokenizer
from model_defs.layers.embedding import Pooling, ScoreHead
from model_defs.sharding import ShardingRules, make_mesh
from pallas_kernels.ragged_paged_attention import default_page_size, import_kernels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlatformDefaults:
    """What suits a platform when the user does not say.

    Attributes:
        max_texts: rows of a step whose requests are only read.
        full_contexts: the pool grows no larger than this many requests of the full context need.
        first_tokens: tokens of the bucket to serve with first, where memory is no question; until
            there are others, prompts are cut to this and decoding is padded to it. None: the
            largest bucket.
        fine_buckets: sizes between the powers of two; time grows with the padding, and a compile
            keeps no request waiting.
    """

    max_rows: int
    max_texts: int
    max_tokens_per_step: int
    full_contexts: int
    first_tokens: int | None = None
    fine_buckets: bool = True


# A CPU's memory is shared with everything else its user runs, so the pool stays small there.
DEFAULTS = {
    "cpu": PlatformDefaults(
        max_rows=16,
        max_texts=64,
        max_tokens_per_step=512,
        full_contexts=4,
        first_tokens=64,
        fine_buckets=False,
    ),
    "tpu": PlatformDefaults(
        max_rows=256, max_texts=256, max_tokens_per_step=4096, full_contexts=256
    ),
    "gpu": PlatformDefaults(
        max_rows=256, max_texts=256, max_tokens_per_step=8192, full_contexts=256
    ),
}


def step_limits(config: EngineConfig, defaults: PlatformDefaults) -> tuple[int, int]:
    """Rows and tokens of the largest step; what the user leaves open follows what is given.

    Raises:
        ConfigError: both are given, and the rows do not fit in the tokens.
    """
    rows, tokens = config.max_running_requests, config.chunked_prefill_size
    if tokens is None:
        tokens = max(defaults.max_tokens_per_step, rows or 0)
    if rows is None:
        rows = min(defaults.max_rows, tokens)
    if rows > tokens:
        raise ConfigError(
            f"--max-running-requests {rows} is more than --chunked-prefill-size {tokens}: every "
            f"running request needs a token in each step. Raise the latter or lower the former."
        )
    return rows, tokens


def first_bucket(buckets: Sequence[Bucket], max_rows: int, first_tokens: int | None) -> Bucket:
    """Choose the bucket to serve with first: it holds every row, and `first_tokens` tokens."""
    for bucket in sorted(b for b in buckets if not b.decode_only):
        if first_tokens is not None and bucket.rows == max_rows and bucket.tokens >= first_tokens:
            return bucket
    return max(buckets)


def compile_order(buckets: Sequence[Bucket], first: Bucket) -> list[Bucket]:
    """Return what to compile behind the first bucket, that which gains most before the rest.

    One request alone decodes in the smallest bucket, a long prompt takes the largest.
    """
    ends = (min(buckets), max(buckets))
    return [b for b in dict.fromkeys((*ends, *sorted(buckets))) if b != first]


@dataclass(frozen=True)
class ModelInfo:
    """What is being served, and with how much memory."""

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    num_layers: int
    num_parameters: int
    max_model_len: int
    page_size: int
    num_pages: int  # per rank
    max_running_requests: int  # per rank
    platform: str
    tp_size: int
    dp_size: int
    task: str = "generate"  # or "score", "embed"
    labels: int | None = None  # scores of a text, for "score"
    embedding_size: int | None = None  # for "embed"
    is_normalized: bool = False  # embeddings have length 1
    end_token: int | None = None  # with which a text must end to be scored


class Engine:
    """Load a model and generate from it, or read texts with it, step by step.

    Args:
        config: what to load and how.
        progress: told about loading and compiling.
        needs_tokenizer: False for token ids in and out; then no token id ends a request by itself.

    Raises:
        CheckpointError, UnsupportedConfig, WeightPlanError, NotEnoughMemory, ConfigError: the model
            cannot be served as asked; the message says what to change.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        needs_tokenizer: bool = True,
    ) -> None:
        start_s = time.perf_counter()
        configure_jax(config)
        self.config = config
        self._closed = False
        cache_dir = config.download_dir or user_cache_dir()
        is_dummy = config.load_format == "dummy"
        opener = open_config if is_dummy else open_checkpoint
        checkpoint = opener(config.model_path, config.revision, cache_dir, progress)
        self._build(checkpoint)
        with large_stack_pool(1) as pool:  # the compiler needs no weights: both at once
            sized = pool.submit(self._size_pool, progress)
            self.tokenizer = (
                load_tokenizer(config, checkpoint) if needs_tokenizer else NoTokenizer()
            )
            self.runner.params = (
                dummy_params(self.runner.model, config.random_seed, progress)
                if is_dummy
                else load_params(self.runner.model, checkpoint, progress, self._family)
            )
            if self._guess_pages() == self._max_pages:  # clearing memory takes a while: now
                self.runner.allocate(self._max_pages)
            self._start_serving(*sized.result(), progress)
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._num_seeds = 0
        self.steps = 0
        info = self.model_info
        logger.info(
            "%s (%s, %s) on %s tp=%d dp=%d: %d pages of %d tokens a rank, context %d, "
            "%d buckets, ready in %.1f s",
            info.name,
            info.architecture,
            info.dtype,
            info.platform,
            info.tp_size,
            info.dp_size,
            info.num_pages,
            info.page_size,
            info.max_model_len,
            len(self._all_buckets),
            time.perf_counter() - start_s,
        )

    # ---- start-up -----------------------------------------------------------------------------

    def _build(self, checkpoint: Checkpoint) -> None:
        """Everything that needs no weights: the model's definition and the sizes of a step."""
        config = self.config
        device = None if config.device == "auto" else config.device
        devices = jax.devices(device)
        platform = devices[0].platform
        import_kernels(platform)  # here, so that stored steps find what their kernels register
        defaults = DEFAULTS.get(platform, DEFAULTS["gpu"])
        mesh = make_mesh(config.dp_size, config.tp_size, devices, ep_size=config.ep_size)
        rules = ShardingRules(mesh)
        family, spec = family_and_spec(config, checkpoint)
        dtype = dtype_of(config.dtype, checkpoint.config, platform)
        model = build_model(spec, rules, dtype, dtype)
        max_len = config.context_length or spec.max_length
        if max_len > spec.max_length:
            raise ConfigError(
                f"--context-length is {max_len}; this model was made for {spec.max_length} tokens "
                f"(max_position_embeddings). Lower it."
            )
        self._family = family
        if spec.task == "embed":
            log_embedding(checkpoint, spec)
        if spec.task != "generate":  # rows come and go with every step, so more of them fit
            defaults = dataclasses.replace(defaults, max_rows=defaults.max_texts)
        max_rows, self._max_tokens = step_limits(config, defaults)
        self.runner = Runner(
            model,
            page_size=config.page_size or default_page_size(platform),
            max_rows=max_rows,
            max_model_len=max_len,
            store=StepStore.of(config),
        )
        self._max_model_len = max_len
        self._max_pages = self._most_pages(min(max_rows, defaults.full_contexts))
        mesh = rules.mesh
        self._budget_bytes = memory_budget_bytes(
            mesh.devices.flat[0], config.mem_fraction_static, mesh.size
        )
        self._all_buckets = make_buckets(
            self._max_tokens,
            max_rows,
            decodes=spec.task == "generate",
            fine=defaults.fine_buckets,
        )
        if config.skip_background_compile:
            self._all_buckets = self._all_buckets[-1:]  # the largest; it holds every batch
        self._first_bucket = first_bucket(self._all_buckets, max_rows, defaults.first_tokens)
        self._info = {
            "name": config.model_path,
            "architecture": checkpoint.config["architectures"][0],
            "dtype": str(dtype),
            "vocab_size": spec.vocab,
            "num_layers": len(spec.layers),
            "num_parameters": model.module.num_parameters,
            "platform": platform,
            "task": spec.task,
            "labels": spec.head.labels if isinstance(spec.head, ScoreHead) else None,
            "embedding_size": spec.d_model if isinstance(spec.head, Pooling) else None,
            "is_normalized": isinstance(spec.head, Pooling) and spec.head.normalize,
            "end_token": spec.head.end_token if isinstance(spec.head, ScoreHead) else None,
        }

    def _most_pages(self, full_contexts: int) -> int:
        """Pages a rank's pool may have, whatever memory there is."""
        config, runner = self.config, self.runner
        if config.max_total_tokens is None:
            return full_contexts * runner.pages_per_row
        max_pages = -(-config.max_total_tokens // runner.page_size)
        if max_pages < runner.pages_per_row:
            raise ConfigError(
                f"--max-total-tokens {config.max_total_tokens} is {max_pages} pages of "
                f"{runner.page_size} tokens; one request of the full context needs "
                f"{runner.pages_per_row}. Raise it or lower --context-length."
            )
        return max_pages

    def _start_serving(
        self,
        num_pages: int,
        first: Bucket,
        compiled: jax.stages.Compiled,
        progress: Progress | None,
    ) -> None:
        """Allocate the pool, serve with the first bucket, compile the others behind it."""
        if self.runner.num_pages != num_pages:
            self.runner.allocate(num_pages)
        self.runner.install(first, compiled)
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=self.runner.page_size,
            max_rows=self.runner.max_rows,
            max_tokens_per_step=min(self._max_tokens, first.tokens),
            max_model_len=self._max_model_len,
            num_ranks=self.runner.num_ranks,
            buckets=(first,),
        )
        # Handed over through a queue: the scheduler belongs to the thread that steps.
        self._ready: queue.SimpleQueue[tuple[Bucket, jax.stages.Compiled]] = queue.SimpleQueue()
        self._compiler = BackgroundCompiler(
            self.runner,
            compile_order(self._all_buckets, first),
            lambda bucket, step: self._ready.put((bucket, step)),
            progress,
            fits=self._fits,
            first=first,
        )
        self.compiles = CompileCounter()
        self._has_all_compiled = False

    def _guess_pages(self) -> int:
        """Pages a rank can have if the step's temporaries cost nothing."""
        weights_bytes = params_bytes_per_device(self.runner.model)
        room = (self._budget_bytes - weights_bytes) // self.runner.page_bytes
        return max(self.runner.pages_per_row, min(self._max_pages, room))

    def _fits(self, memory: StepMemory) -> bool:
        """Whether a step that needs this can run beside the pool."""
        return memory.fixed + memory.pages <= self._budget_bytes

    def _size_pool(self, progress: Progress | None) -> tuple[int, Bucket, jax.stages.Compiled]:
        """Compile the first bucket and size the pool from what the compiler says it needs.

        The step is compiled for as many pages as weights alone would leave room for. Where that is
        the most a pool may have, and it still fits beside temporaries that grow with the tokens up
        to the largest bucket, the first bucket will do. Else the largest bucket decides: where its
        temporaries do not fit, it is compiled once more for the exact number.

        Returns:
            the pages a rank can have, the bucket, and its step compiled for that many.
        """
        if progress is not None:
            progress("compiling the first bucket", 0, 1)
        runner, max_pages = self.runner, self._max_pages
        budget, page_bytes = self._budget_bytes, runner.page_bytes
        first, largest = self._first_bucket, max(self._all_buckets)
        guess = self._guess_pages()
        if first != largest:
            weights_bytes = params_bytes_per_device(runner.model)
            compiled, memory = runner.compile(first, guess)
            grown = -(-largest.tokens // first.tokens) * (memory.fixed - weights_bytes)
            if guess < max_pages or weights_bytes + grown + guess * page_bytes > budget:
                first = largest
        if first == largest:
            compiled, memory = runner.compile(largest, guess)
            exact = pages_that_fit(budget, memory, page_bytes, max_pages, runner.pages_per_row)
            if exact != guess:
                compiled, _ = runner.compile(largest, exact)
            guess = exact
        if progress is not None:
            progress("compiling the first bucket", 1, 1)
        return guess, first, compiled

    # ---- serving ------------------------------------------------------------------------------

    def add(
        self, prompt_token_ids: list[int], sampling: SamplingParams | None, request_id: str
    ) -> Request:
        """Queue a request.

        Args:
            sampling: None for a text to be read; the finished request's `result` is then its
                scores f32[labels] or its embedding f32[D].

        Raises:
            InvalidRequest: it can never be served (empty or too long a prompt, unknown tokens), or
                is not what the model is for.
        """
        task = self._info["task"]
        if (sampling is None) != (task != "generate"):
            raise InvalidRequest(
                f"{self._info['architecture']} is served for the task {task!r}; a request "
                f"{'without' if sampling is None else 'with'} sampling parameters is not for it."
            )
        vocab = self._info["vocab_size"]
        if prompt_token_ids and not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab:
            raise InvalidRequest(
                f"prompt token ids must lie in 0..{vocab - 1}; found "
                f"{min(prompt_token_ids)}..{max(prompt_token_ids)}"
            )
        request = Request(
            id=request_id,
            tokens=list(prompt_token_ids),
            num_prompt=len(prompt_token_ids),
            sampling=sampling or NO_SAMPLING,
            eos_ids=self.tokenizer.eos_ids,
            seed=self._seed_of(sampling),
            prefill_only=sampling is None,
        )
        self.scheduler.add(request)
        return request

    def _seed_of(self, sampling: SamplingParams | None) -> int:
        if sampling is None:
            return 0
        if sampling.seed is not None:
            return sampling.seed
        self._num_seeds += 1
        return (self.config.random_seed * 1_000_003 + self._num_seeds) & 0xFFFFFFFF

    def abort(self, request_id: str) -> bool:
        """Stop a request at once; False if it is not known (any more)."""
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[Request]:
        """Dispatch one step, collect the one before; returns the requests that got a token.

        Of those that are only read, the ones that are finished.
        """
        self._take_compiled()
        batch = self.scheduler.schedule()
        if batch is not None:
            self._in_flight.append(self.runner.dispatch(batch))
            self.steps += 1
        touched: list[Request] = []
        keep = 1 if batch is not None and not self.config.disable_overlap_schedule else 0
        while len(self._in_flight) > keep:
            touched += self._collect(self._in_flight.popleft())
        return touched

    def _collect(self, done: InFlight) -> list[Request]:
        spec = self.runner.model.spec
        if spec.task == "generate":
            return self.scheduler.update(done.batch, self.runner.collect(done))
        keep_read(spec, done.batch, self.runner.collect_read(done))
        finished = self.scheduler.update(done.batch, [[0] * len(rows) for rows in done.batch.ranks])
        for request in finished:
            request.result = finish_read(spec, request.result, request.num_prompt)
        return finished

    def _take_compiled(self) -> None:
        if self._has_all_compiled:
            return
        is_last = self._compiler.is_done  # asked first: what comes after is taken the next time
        if not self._ready.empty():
            while not self._ready.empty():
                self.runner.install(*self._ready.get())
            buckets = self.runner.buckets
            largest = max(bucket.tokens for bucket in buckets)
            self.scheduler.max_tokens_per_step = min(self._max_tokens, largest)
            self.scheduler.set_buckets(buckets)
        if is_last:
            self._has_all_compiled = True
            self.compiles.reset()

    @property
    def is_warm(self) -> bool:
        """Every bucket is compiled."""
        return self._compiler.is_done

    def wait_until_warm(self) -> None:
        """Block until every bucket is compiled and installed. Call it from the stepping thread."""
        self._compiler.wait()
        self._take_compiled()

    def run_every_bucket(self, times: int) -> None:
        """Run each bucket without any row, so that its first run is not a request's.

        Call it from the stepping thread.
        """
        for bucket in self.runner.buckets:
            for _ in range(times):
                self.runner.run_empty(bucket)

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(
            **self._info,
            max_model_len=self._max_model_len,
            page_size=self.runner.page_size,
            num_pages=self.runner.num_pages,
            max_running_requests=self.runner.max_rows,
            tp_size=self.config.tp_size,
            dp_size=self.config.dp_size,
        )

    def stats(self) -> dict[str, object]:
        """Counters for /get_server_info: scheduler, compile progress, run-time compiles."""
        return {
            "steps": self.steps,
            "scheduler": self.scheduler.stats,
            "is_warm": self.is_warm,
            "buckets_compiled": 1 + self._compiler.done,
            "buckets": len(self._all_buckets),
            "compile_s": {str(b): round(s, 3) for b, s in self.runner.compile_s.items()},
            "compiles_after_warmup": self.compiles.count if self._has_all_compiled else 0,
        }

    def close(self) -> None:
        """Stop background work and free the device's memory; safe to call again."""
        if not self._closed:
            self._closed = True
            self._compiler.close()
            self._in_flight.clear()
            self.runner.close()


def load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer that the config names, else the checkpoint's own.

    Raises ConfigError where there is none (random weights go without), TokenizerError where it
    cannot be used.
    """
    folder = checkpoint.tokenizer_dir
    if config.tokenizer_path is not None:
        folder = Path(config.tokenizer_path).expanduser()
        if not folder.is_dir():
            cache_dir = config.download_dir or user_cache_dir()
            folder = open_checkpoint(config.tokenizer_path, None, cache_dir).tokenizer_dir
    if folder is None:
        if config.load_format == "dummy" and config.tokenizer_path is None:
            return NoTokenizer()
        raise ConfigError(
            f"{config.model_path} holds no tokenizer. Name a folder or hub id that does with "
            f"--tokenizer-path."
        )
    return Tokenizer.load(folder, generation_config=checkpoint.generation_config)
