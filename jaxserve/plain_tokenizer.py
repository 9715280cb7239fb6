"""The tokenizer of a plain folder, without transformers: its import costs more than a warm start.

A folder is plain where transformers would add nothing to what the `tokenizers` library reads from
tokenizer.json. Such are the folders rebuilt from GGUF files. Any other gets None from `load`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# The keys of tokenizer_config.json that are read here, or change nothing in what is done here.
KNOWN_KEYS = frozenset(
    {
        *SPECIAL_NAMES,
        "tokenizer_class",
        "add_bos_token",
        "add_eos_token",
        "clean_up_tokenization_spaces",
        "model_max_length",
        "chat_template",
    }
)
FILES = frozenset({"tokenizer.json", "tokenizer_config.json", "generation_config.json"})
MAX_VOCAB = 100_000  # transformers looks for a known mistake in larger ones
MESSAGE_KEYS = frozenset({"role", "content"})
# What transformers gives a template beyond jinja itself, `raise_exception` aside.
EXTRAS = re.compile(r"\b(generation|endgeneration|tojson|strftime_now|namespace|dict)\b")


class PlainTokenizer:
    """The part of a transformers tokenizer that is used here, with the same results."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template: str | None = config.get("chat_template")
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self._special = {name: config[name] for name in SPECIAL_NAMES if config.get(name)}
        eos = config.get("eos_token")
        self.eos_token_id = None if eos is None else backend.token_to_id(eos)
        self._folder = folder

    @classmethod
    def load(cls, folder: Path) -> PlainTokenizer | None:
        """Read a folder; None where transformers might read something else from it."""
        if not {"tokenizer.json", "tokenizer_config.json"} <= _names(folder) <= FILES:
            return None
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if not _is_plain(config):
            return None
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        wanted = {config[name] for name in SPECIAL_NAMES if config.get(name)}
        is_changed = backend.truncation is not None or backend.padding is not None
        if is_changed or not wanted <= special or backend.get_vocab_size() > MAX_VOCAB:
            return None
        flags = [config[name] for name in ("add_bos_token", "add_eos_token") if name in config]
        if flags and (any(flags) or backend.encode("").ids):
            return None  # which of the flags and the backend wins differs between its versions
        return cls(backend, config, folder)

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = False) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template: str | None, **how: Any
    ) -> str:
        """Render a conversation as text, as a rule with the prompt for the answer.

        What only transformers knows about (other fields of a message, functions it lends to
        templates) it is asked to render.
        """
        template = chat_template or self.chat_template
        if template is None or not messages or not _can_render(template, messages):
            return self._in_full.apply_chat_template(messages, chat_template=chat_template, **how)
        asks_for_answer = how.pop("add_generation_prompt")
        assert how == {"tokenize": False}
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=asks_for_answer,
            **self._special,
        )

    @functools.cached_property
    def _in_full(self) -> Any:
        return load_hf_tokenizer(self._folder)


def load_hf_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer with transformers; raises what transformers raises."""
    # It warns at import that PyTorch is missing, which nothing here needs.
    logging.getLogger("transformers").addFilter(_is_of_use)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True
    )


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _is_plain(config: Mapping[str, Any]) -> bool:
    texts = (*SPECIAL_NAMES, "chat_template")
    return (
        config.get("tokenizer_class") in PLAIN_CLASSES
        and config.keys() <= KNOWN_KEYS
        and all(isinstance(config.get(name), str | None) for name in texts)
        and not EXTRAS.search(config.get("chat_template") or "")
    )


def _can_render(template: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    return not EXTRAS.search(template) and all(
        message.keys() <= MESSAGE_KEYS and all(type(value) is str for value in message.values())
        for message in messages
    )


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
