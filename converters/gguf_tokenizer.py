"""Rebuild a Hugging Face tokenizer folder from the vocabulary inside a GGUF file.

Two kinds of vocabulary: byte-level BPE (GGUF model `gpt2`, with merges, split by a regex that the
file only names) and SentencePiece BPE (GGUF model `llama`, with scores instead of merges).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from converters.errors import CheckpointError
from converters.gguf_file import GGUFFile
from converters.write_aside import folder_written_aside

FORMAT_VERSION = 1  # part of the cache key; raise it when this module's output changes

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # llama.cpp's token types
SPACE = "\u2581"  # how SentencePiece writes a space

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = GPT4O_SPLIT.replace(_SUFFIX, "").replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Splitting:
    """How byte-level BPE cuts text before merging.

    `pattern` None is GPT-2's own; `digits` cuts every digit off first; `ignore_merges` takes a word
    that is a token whole; `nfc` normalizes first; `add_bos` is the default of a silent file.
    """

    pattern: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2 = Splitting()
_DIGITS = Splitting(digits=True)
_LLAMA3 = Splitting(LLAMA3_SPLIT, ignore_merges=True, add_bos=True)
_QWEN2 = Splitting(QWEN2_SPLIT, nfc=True)
_CL100K = Splitting(LLAMA3_SPLIT)

SPLITTINGS: Mapping[str, Splitting] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-v2-code"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    "gpt-4o": Splitting(GPT4O_SPLIT),
    "tekken": Splitting(TEKKEN_SPLIT, ignore_merges=True, add_bos=True),
}
"""tokenizer.ggml.pre -> how text is cut."""

END_OF_GENERATION = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
    }
)
"""Control tokens that end an answer in any model that has them."""


def cached_tokenizer(file: GGUFFile, cache_dir: Path) -> Path | None:
    """Return the tokenizer folder of `file`, written into `cache_dir` unless it is there already.

    None when the file has no vocabulary. Raises CheckpointError for a vocabulary that cannot be
    rebuilt, or a cache folder that cannot be written.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    keys = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    keys["architecture"] = file.metadata.get("general.architecture")
    text = json.dumps([FORMAT_VERSION, keys], sort_keys=True)
    folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:24]
    if (folder / "tokenizer.json").is_file():
        return folder
    try:
        with folder_written_aside(folder) as aside:
            write_tokenizer(file, aside)
    except OSError as error:
        raise CheckpointError(
            f"The tokenizer of {file.path} cannot be kept in {cache_dir}: {error}. Give another "
            "cache (download) folder."
        ) from error
    except CheckpointError:
        if (folder / "tokenizer.json").is_file():  # another process was faster
            return folder
        raise
    return folder


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
    vocabulary = _Vocabulary(file)
    builders = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in builders:
        raise CheckpointError(
            f"{file.path} has a tokenizer of kind {kind!r}; supported: {', '.join(builders)}. "
            "Give the original model's tokenizer folder instead (--tokenizer-path)."
        )
    tokenizer = builders[kind](vocabulary)
    tokenizer.add_tokens(vocabulary.unsplit_tokens())
    tokenizer.post_processor = vocabulary.post_processor()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(vocabulary.tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def end_of_generation_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids that end an answer: the file's eos first, then its other end tokens."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=False)):
        if token_type == CONTROL and token in END_OF_GENERATION:
            ids.append(token_id)
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


class _Vocabulary:
    """The tokenizer part of a GGUF file's metadata."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.metadata = file.metadata
        self.architecture = file.metadata.get("general.architecture")
        self.is_sentencepiece = self.get("model") == "llama"
        self.tokens: list[str] = self.get("tokens")
        self.types: list[int] = self.get("token_type") or [1] * len(self.tokens)
        if self.is_sentencepiece:
            # llama.cpp spells the spaces of user-defined tokens plainly; the vocabulary does not.
            self.tokens = [
                token.replace(" ", SPACE) if token_type == USER_DEFINED else token
                for token, token_type in zip(self.tokens, self.types, strict=True)
            ]
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise CheckpointError(
                f"{file.path} lists {len(self.tokens) - len(self.ids)} tokens twice, so its "
                "tokenizer cannot be rebuilt. Give the original model's (--tokenizer-path)."
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def token(self, name: str) -> str | None:
        """Return the spelling of a special token (`bos`, `eos`, `unknown`, `padding`)."""
        token_id = self.get(f"{name}_token_id")
        has_token = token_id is not None and 0 <= token_id < len(self.tokens)
        return self.tokens[token_id] if has_token else None

    def splitting(self) -> Splitting:
        name = self.get("pre", "default")
        if name not in SPLITTINGS:
            raise CheckpointError(
                f"{self.file.path} cuts text by the rule {name!r} (tokenizer.ggml.pre); known: "
                f"{', '.join(SPLITTINGS)}. Give the original model's tokenizer (--tokenizer-path)."
            )
        return SPLITTINGS[name]

    def unsplit_tokens(self) -> list[AddedToken]:
        """Return the tokens matched whole in the text; only control tokens count as special."""
        strips = {"<unk>", "<s>", "<|endoftext|>"} if self.architecture == "phi3" else None
        return [
            AddedToken(
                token,
                special=token_type != USER_DEFINED,
                normalized=False,
                rstrip=self.is_sentencepiece and strips is not None and token not in strips,
            )
            for token, token_type in zip(self.tokens, self.types, strict=True)
            if token_type in (UNKNOWN, CONTROL)
            or (token_type == USER_DEFINED and not (self.is_sentencepiece and SPACE in token))
        ]

    def adds(self, name: str) -> str | None:
        """Return the bos or eos token if encoding adds it by itself, else None."""
        default = name == "bos" and (self.is_sentencepiece or self.splitting().add_bos)
        return self.token(name) if self.get(f"add_{name}_token", default) else None

    def post_processor(self) -> processors.TemplateProcessing:
        bos, eos = self.adds("bos"), self.adds("eos")

        def template(sequence: str, type_id: int) -> str:
            parts = (bos, sequence, eos)
            return " ".join(f"{part}:{type_id}" for part in parts if part is not None)

        return processors.TemplateProcessing(
            single=template("$A", 0),
            pair=f"{template('$A', 0)} {template('$B', 1)}",
            special_tokens=[(token, self.ids[token]) for token in (bos, eos) if token is not None],
        )

    def tokenizer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.token("bos"),
            "eos_token": self.token("eos"),
            "unk_token": self.token("unknown"),
            "pad_token": self.token("padding"),
            "add_bos_token": self.adds("bos") is not None,
            "add_eos_token": self.adds("eos") is not None,
            "clean_up_tokenization_spaces": False,
        }
        if (length := self.metadata.get(f"{self.architecture}.context_length")) is not None:
            config["model_max_length"] = length
        if (template := self.metadata.get("tokenizer.chat_template")) is not None:
            config["chat_template"] = template
        return config


def _build_byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    splitting = vocabulary.splitting()
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.get("merges", ())]
    try:
        model = models.BPE(
            vocab=vocabulary.ids, merges=merges, ignore_merges=splitting.ignore_merges
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{vocabulary.file.path}: its merges do not fit its tokens ({error}). Download it "
            "again, or give the original model's tokenizer (--tokenizer-path)."
        ) from error
    tokenizer = Tokenizer(model)
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    whole = splitting.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_derive_merges(vocabulary),
            unk_token=vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary.ids,
        )
    )
    prefixed = vocabulary.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _derive_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores imply, best first.

    Every way to cut a token into two tokens is a merge that makes it, as good as the token's score.
    User-defined tokens (runs of spaces, say) come first: SentencePiece looks for them before all.
    """
    ids, scores = vocabulary.ids, vocabulary.get("scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise CheckpointError(
            f"{vocabulary.file.path} has no score per token, so its tokenizer cannot be rebuilt. "
            "Give the original model's tokenizer (--tokenizer-path)."
        )
    ranked = []
    for (token, token_id), token_type in zip(ids.items(), vocabulary.types, strict=True):
        if token_type in (UNKNOWN, CONTROL, BYTE):
            continue
        score = math.inf if token_type == USER_DEFINED else scores[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, token_id, len(left), left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
