"""The shared test settings themselves: devices, cache, byte tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest
import transformers


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_dir: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(byte_tokenizer_dir)


def test_there_are_eight_virtual_devices() -> None:
    assert jax.device_count("cpu") == 8


def test_workers_and_subprocesses_share_one_compile_cache(compile_cache: Path) -> None:
    assert jax.config.jax_compilation_cache_dir == str(compile_cache)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(compile_cache)
    assert jax.config.jax_compilation_cache_max_size > 0


def test_ids_of_the_byte_tokenizer_are_bytes(tokenizer) -> None:
    text = "Grüße, 世界! \x00\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_byte_tokenizer_knows_its_special_tokens(tokenizer) -> None:
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (256, 257, 258)
    assert len(tokenizer) == 262


def test_byte_tokenizer_has_a_chat_template(tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><|user|>hi<eos><|assistant|>"
    assert tokenizer.encode(text) == [257, 260, *b"hi", 258, 261]
