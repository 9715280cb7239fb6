"""Text to token ids and back: encode, chat template, incremental decode, stop strings.

A thin wrapper over the checkpoint's own Hugging Face tokenizer. It executes no code from the
checkpoint: chat templates run in a sandboxed jinja environment. Importing transformers takes longer
than loading a compiled model, so `plain_tokenizer.py` stands in for it where it does the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxserve.plain_tokenizer import PlainTokenizer, load_hf_tokenizer
from jaxserve.request import InvalidRequest

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"

# A character is at most 4 bytes, so at most 4 byte tokens: a text that still ends in a
# replacement character after twice as many tokens holds bytes that are not UTF-8.
_PENDING_TOKENS = 8
_GARBAGE_TOKENS = 64
_WINDOW_TOKENS = 16
_CONTEXT_TOKENS = 4

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")
# Settings of a generation_config.json that change what is generated and are not applied here, with
# the values that change nothing (None never does).
_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
}


class TokenizerError(ValueError):
    """The tokenizer folder or the chat template cannot be used."""


WITHOUT_TOKENIZER = (
    "this model is served without a tokenizer, so it takes token ids only: input_ids of /generate, "
    "token ids as the prompt of /v1/completions. For text start the server with --tokenizer-path."
)


class Tokenizer:
    """Encode prompts and decode tokens of one model.

    `eos_ids` are the tokens that end an answer: the tokenizer's own end-of-text token and every
    `eos_token_id` of the generation config, which is where checkpoints list their end-of-turn
    tokens. `generation_config` is the content of generation_config.json, {} if there is none.
    """

    def __init__(
        self, hf_tokenizer: Any, generation_config: Mapping[str, Any], chat_template: str | None
    ) -> None:
        self.hf = hf_tokenizer
        self.generation_config = dict(generation_config)
        self.chat_template = chat_template
        listed = self.generation_config.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        own = hf_tokenizer.eos_token_id
        self.eos_ids = frozenset(int(i) for i in [own, *listed] if i is not None)
        self._backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        self.special_ids = frozenset(
            id for id, token in hf_tokenizer.added_tokens_decoder.items() if token.special
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """Load the tokenizer of an HF model folder.

        Args:
            folder: holds tokenizer.json or tokenizer.model, and tokenizer_config.json.
            generation_config: None reads generation_config.json in the folder, if there is one.
            chat_template: jinja text or the path of a file; None takes the checkpoint's own.

        Raises:
            TokenizerError: the folder is missing or holds no usable tokenizer.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(
                f"tokenizer folder {str(folder)!r} does not exist. Pass --tokenizer-path with a "
                "folder that holds tokenizer.json or tokenizer.model."
            )
        try:
            hf_tokenizer = PlainTokenizer.load(folder) or load_hf_tokenizer(folder)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise TokenizerError(
                f"no usable tokenizer in {str(folder)!r}: {error}. Pass --tokenizer-path with a "
                "folder that holds tokenizer.json or tokenizer.model."
            ) from error
        if generation_config is None:
            file = folder / "generation_config.json"
            generation_config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        template = None if chat_template is None else load_chat_template(chat_template)
        tokenizer = cls(hf_tokenizer, generation_config, template)
        if tokenizer.not_applied:
            logger.warning(
                "the checkpoint's generation_config sets %s, which is not applied here: answers "
                "may differ from those its authors meant",
                ", ".join(f"{name}={value!r}" for name, value in tokenizer.not_applied.items()),
            )
        return tokenizer

    has_text = True  # of `NoTokenizer` False

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None or bool(getattr(self.hf, "chat_template", None))

    @property
    def default_sampling(self) -> dict[str, float | int]:
        """The sampling settings the checkpoint's authors chose, by `SamplingParams` name."""
        given = {name: self.generation_config.get(name) for name in _SAMPLING_DEFAULTS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def not_applied(self) -> dict[str, Any]:
        """The checkpoint's settings that would change what is generated, but are not applied."""
        given = {name: self.generation_config.get(name) for name in _NOT_APPLIED}
        return {
            name: value
            for name, value in given.items()
            if value is not None and value not in _NOT_APPLIED[name]
        }

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, by default with the BOS the model was trained with."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the prompt is not valid Unicode text: {error}.") from error
        return self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Return the token ids of two texts, joined as the tokenizer joins pairs."""
        try:
            (first + second).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}.") from error
        if self._backend is not None:
            return self._backend.encode(first, second, add_special_tokens=True).ids
        return self.hf.encode(first, second, add_special_tokens=True, verbose=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        if self._backend is not None:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.hf.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        asks_for_answer: bool = True,
    ) -> str:
        """Return the text of a conversation, up to where the assistant starts to speak.

        Args:
            messages: dicts with `role` and `content` (text).
            chat_template: jinja text that replaces the checkpoint's template.
            asks_for_answer: False gives the conversation as it is, to be read as a whole.

        Raises:
            InvalidRequest: there is no template, or the template refuses these messages.
        """
        template = chat_template or self.chat_template
        if template is None and not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template. Start the server with --chat-template FILE, or "
                "send plain text to /v1/completions."
            )
        try:
            return self.hf.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=asks_for_answer,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"the chat template cannot render these messages: {error}. Check the roles and "
                "their order, or pass another template with --chat-template."
            ) from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        asks_for_answer: bool = True,
    ) -> list[int]:
        """Return the token ids of a conversation; the arguments are those of `render_chat`.

        The template writes its own BOS, so none is added here.
        """
        text = self.render_chat(
            messages, chat_template=chat_template, asks_for_answer=asks_for_answer
        )
        return self.encode(text, add_special_tokens=False)


class NoTokenizer(Tokenizer):
    """Stands in for the tokenizer of a model that has none: token ids in and out, no text.

    No token ends an answer by itself. What needs text raises InvalidRequest; decoding gives none.
    """

    has_text = False

    def __init__(self) -> None:
        self.hf = self.chat_template = self._backend = None
        self.generation_config = {}
        self.eos_ids = self.special_ids = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise InvalidRequest(WITHOUT_TOKENIZER)

    def encode_pair(self, first: str, second: str) -> list[int]:
        raise InvalidRequest(WITHOUT_TOKENIZER)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        asks_for_answer: bool = True,
    ) -> str:
        raise InvalidRequest(WITHOUT_TOKENIZER)


def load_chat_template(path_or_text: str) -> str:
    """Return jinja text given the text itself or the path of a file that holds it.

    What contains a jinja tag or a line break is text; anything else is a path.
    """
    if "{{" in path_or_text or "{%" in path_or_text or "\n" in path_or_text:
        text, source = path_or_text, "inline"
    else:
        file = Path(path_or_text)
        if not file.is_file():
            raise TokenizerError(
                f"--chat-template {path_or_text!r} is neither a file nor jinja text."
            )
        text, source = file.read_text("utf-8"), path_or_text
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"--chat-template ({source}) is not valid jinja: line {error.lineno}: {error.message}."
        ) from error
    return text


class StreamDecoder:
    """Turn tokens into text as they arrive; what it returned adds up to the whole text.

    A character whose bytes are spread over several tokens is held back until it is complete.
    The work per token does not grow with the length of the answer: only a short window of tokens
    is decoded, which begins early enough for the tokenizer to place spaces as it would in the
    whole text. The end of the prompt is the first context, so an answer keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens that have text: no special ones
        self._num_emitted = 0  # characters of the window's text that were returned or are prompt
        for size in (_WINDOW_TOKENS // 2, _WINDOW_TOKENS, 4 * _WINDOW_TOKENS):
            self._window = self._without_special(prompt_token_ids[-size:])
            text = tokenizer.decode(self._window)
            self._num_emitted = len(text.rstrip(REPLACEMENT))
            if size >= len(prompt_token_ids) or (text and REPLACEMENT not in text):
                break
        self._cuts = [len(self._window)]  # window positions where the text was complete

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the text that became certain, often one word."""
        return "".join([self._push_one(token_id) for token_id in self._without_special(token_ids)])

    def finish(self, token_ids: Sequence[int] = ()) -> str:
        """Take the last tokens and return all text that is left.

        Bytes that never became a character are U+FFFD. Cheaper than `push` for many tokens.
        """
        self._window.extend(self._without_special(token_ids))
        return self._tokenizer.decode(self._window)[self._num_emitted :]

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_pending = len(self._window) - self._cuts[-1]
        if text.endswith(REPLACEMENT) and num_pending <= _GARBAGE_TOKENS:
            # 3 bytes may still become a character; what is before them cannot change any more.
            end = len(text) - 3 if num_pending > _PENDING_TOKENS else self._num_emitted
        else:
            end = len(text)
            self._cuts.append(len(self._window))
        new = text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        if self._cuts[-1] == len(self._window) > _WINDOW_TOKENS:
            self._shorten()
        return new

    def _without_special(self, token_ids: Sequence[int]) -> list[int]:
        special_ids = self._tokenizer.special_ids
        return [token_id for token_id in token_ids if token_id not in special_ids]

    def _shorten(self) -> None:
        """Drop the front of the window, up to a cut that leaves some text as context."""
        limit = len(self._window) - _CONTEXT_TOKENS
        start = max((cut for cut in self._cuts if cut <= limit), default=0)
        context = self._tokenizer.decode(self._window[start:])
        if not context and len(self._window) < 4 * _WINDOW_TOKENS:
            return  # without text before it, a leading space would be dropped
        self._window = self._window[start:]
        self._cuts = [cut - start for cut in self._cuts if cut >= start]
        self._num_emitted = len(context)


class StopStrings:
    """Find the first stop string in a text that arrives in pieces.

    Text that could be the beginning of a stop string is held back, so neither a stop string nor
    anything after it is ever returned.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take new text, return what is safe to show; `matched` is set when a stop was found."""
        if not self._stop or self.matched is not None:
            return text if self.matched is None else ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            index, self.matched = min(found)
            self._held = ""
            return text[:index]
        num_held = max(_num_suffix_in_common(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return the text held back: no more will come, so it is not a stop string."""
        held, self._held = self._held, ""
        return held


def _num_suffix_in_common(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
