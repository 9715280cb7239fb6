"""Tokenizers rebuilt from GGUF vocabularies, against the tokenizers they were made from."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from converters.demo import demo_model_path
from converters.errors import CheckpointError
from converters.gguf import GGUFCheckpoint

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll say it's 12345 times.",
    "def tokenize(text):\n    return [w for w in text.split(' ') if w]  # ABCdef 2.5e-3\n",
    "Größe, naïve, façade, Ελληνικά, русский язык, العربية, हिन्दी, 日本語の文章、漢字。",
    "Spaces   and\ttabs\n\n\nand lines\r\n  indented 1 22 333 4444 HELLOWorld helloWORLD CAN'T",
] * 3
STRINGS = [
    *CORPUS,
    "", " ", "  leading", "trailing  ", "a  b   c    d", "\n", "\n\n\n", "\t\t", " \n \n",
    "\r\n\r\n",
    "What is the capital of France? Answer in one sentence.",
    "😀👩‍👩‍👧 🇫🇷 emoji", "é e\u0301 ﬁ Ⅳ ½ ²", "\u00a0nbsp\u3000wide", "I'm DON'T we'LL",
    "x" * 200, '{"a": [1, 2.5e-3], "b": null}', "https://a.b/c?d=e&f#g", "\x00\x01 control",
    "𐍈 gothic",
    "  12  3456", "a1b22c333 1234567 1,000,000.00", "ไทย 한국어",
]  # fmt: skip
PIECES = [
    "a",
    "b",
    "the ",
    " ",
    "\n",
    "é",
    "漢",
    "😀",
    "1",
    "_",
    "-",
    "(",
    "'s",
    " T",
    "\t",
    "ing",
    "<",
]
RANDOM = random.Random(0)
STRINGS += ["".join(RANDOM.choices(PIECES, k=RANDOM.randint(1, 40))) for _ in range(500)]


def assert_same(mine: PreTrainedTokenizerFast, theirs: Any, strings: list[str]) -> None:
    for text in strings:
        ids = theirs.encode(text)
        assert mine.encode(text) == ids, text
        assert mine.decode(ids) == theirs.decode(ids), text


def load(checkpoint: GGUFCheckpoint) -> PreTrainedTokenizerFast:
    assert checkpoint.tokenizer_dir is not None
    return AutoTokenizer.from_pretrained(checkpoint.tokenizer_dir)


@pytest.fixture
def open_vocabulary(
    write_gguf: Callable[..., Path],
    decoder_metadata: Callable[..., dict[str, Any]],
    decoder_tensors: Callable[..., dict[str, np.ndarray]],
    llama_layer: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> Callable[..., GGUFCheckpoint]:
    """Return a function that opens a tiny model with the given `tokenizer.` metadata."""

    def make(metadata: dict[str, Any]) -> GGUFCheckpoint:
        keys = {f"tokenizer.{key}": value for key, value in metadata.items() if value is not None}
        path = write_gguf("llama", decoder_metadata("llama") | keys, decoder_tensors(llama_layer))
        return GGUFCheckpoint(path, tmp_path / "cache")

    return make


# ---- byte-level BPE --------------------------------------------------------------------------

# The pre-tokenizers as the models' own tokenizer.json files have them.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTION
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp writes for a byte-level tokenizer."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in ("<|begin|>", "<|end|>") else 1 for token in tokens],
        "ggml.merges": [" ".join(merge) for merge in merges],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.add_bos_token": False,
    }


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"),
    [("gpt-2", GPT2), ("default", GPT2), ("smollm", DIGITS), ("starcoder", DIGITS),
     ("llama-bpe", LLAMA3), ("dbrx", LLAMA3), ("qwen2", QWEN2), ("tekken", TEKKEN),
     ("gpt-4o", GPT4O)],
)  # fmt: skip
def test_byte_level_equals_its_source(
    open_vocabulary: Callable[..., GGUFCheckpoint],
    pre: str,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> None:
    source = train_byte_level(pre_tokenizer, nfc=pre == "qwen2")
    mine = load(open_vocabulary(byte_level_metadata(source, pre)))
    for text in STRINGS:
        ids = source.encode(text).ids
        assert mine.encode(text) == ids, text
        assert mine.decode(ids) == source.decode(ids, skip_special_tokens=False), text


def test_control_tokens_are_special_and_user_defined_ones_whole(
    open_vocabulary: Callable[..., GGUFCheckpoint],
) -> None:
    metadata = byte_level_metadata(train_byte_level(GPT2), "gpt-2")
    metadata["ggml.tokens"] += ["<tool call>", "[PAD0]"]
    metadata["ggml.token_type"] += [4, 5]
    mine = load(open_vocabulary(metadata))
    user_defined = len(metadata["ggml.tokens"]) - 2
    ids = mine.encode("<|begin|>a<tool call><|end|>")
    assert [ids[0], ids[-2], ids[-1]] == [0, user_defined, 1]
    assert mine.decode(ids, skip_special_tokens=True) == "a<tool call>"
    assert len(mine) == len(metadata["ggml.tokens"])
    assert user_defined + 1 not in mine.encode("[PAD0]")


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),  # llama.cpp's own default for this kind
        ("llama-bpe", {"ggml.add_bos_token": False}, (False, False)),
        ("gpt-2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (True, True)),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    open_vocabulary: Callable[..., GGUFCheckpoint],
    pre: str,
    flags: dict[str, bool],
    expected: tuple[bool, bool],
) -> None:
    metadata = byte_level_metadata(train_byte_level(GPT2), pre)
    del metadata["ggml.add_bos_token"]
    mine = load(open_vocabulary(metadata | flags))
    ids = mine.encode("a b")
    assert (ids[0] == 0, ids[-1] == 1) == expected
    plain = mine.encode("a b", add_special_tokens=False)
    assert ids == [0] * expected[0] + plain + [1] * expected[1]
    pair = mine("a b", "a b").input_ids
    assert pair == ids + ids


def test_chat_template_and_limits_are_kept(open_vocabulary: Callable[..., GGUFCheckpoint]) -> None:
    metadata = byte_level_metadata(train_byte_level(GPT2), "gpt-2")
    template = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
    mine = load(open_vocabulary(metadata | {"chat_template": template}))
    text = mine.apply_chat_template([{"role": "user", "content": "hi é"}], tokenize=False)
    assert text == "<|begin|>hi é<|end|>"
    assert (mine.bos_token, mine.eos_token) == ("<|begin|>", "<|end|>")
    assert mine.model_max_length == 256


def test_a_tokenizer_is_built_once(open_vocabulary: Callable[..., GGUFCheckpoint]) -> None:
    metadata = byte_level_metadata(train_byte_level(GPT2), "gpt-2")
    first = open_vocabulary(metadata).tokenizer_dir
    assert first is not None
    written = (first / "tokenizer.json").stat().st_mtime_ns
    assert open_vocabulary(metadata).tokenizer_dir == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == written
    assert open_vocabulary(metadata | {"ggml.add_bos_token": True}).tokenizer_dir != first
    assert {path.name for path in first.parent.iterdir()} > {first.name}
    assert not list(first.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.pre": "klingon"}, r"'klingon' \(tokenizer\.ggml\.pre\); known: default"),
        ({"ggml.model": "t5"}, "of kind 't5'; supported: gpt2, llama"),
        ({"ggml.merges": ["zzzz yyyy"]}, "merges do not fit"),
        ({"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1]}, "1 tokens twice"),
        ({"ggml.model": "llama"}, "no score per token"),
    ],
)
def test_vocabularies_that_cannot_be_rebuilt_are_refused(
    open_vocabulary: Callable[..., GGUFCheckpoint], change: dict[str, Any], message: str
) -> None:
    metadata = byte_level_metadata(train_byte_level(GPT2), "gpt-2") | change
    checkpoint = open_vocabulary(metadata)
    with pytest.raises(CheckpointError, match=message):
        assert checkpoint.tokenizer_dir
    assert not list(checkpoint.path.parent.glob("cache/tokenizers/*"))


def test_an_unwritable_cache_is_one_clear_error(
    open_vocabulary: Callable[..., GGUFCheckpoint], tmp_path: Path
) -> None:
    checkpoint = open_vocabulary(byte_level_metadata(train_byte_level(GPT2), "gpt-2"))
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="Give another cache"):
        assert checkpoint.tokenizer_dir


# ---- SentencePiece BPE -----------------------------------------------------------------------


def train_sentencepiece(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=3,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(source: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What llama.cpp writes for a SentencePiece model."""
    ids = range(source.get_piece_size())
    kinds = [
        2 if source.is_unknown(i) else 3 if source.is_control(i) else 6 if source.is_byte(i) else 1
        for i in ids
    ]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [source.id_to_piece(i) for i in ids],
        "ggml.scores": [float(source.get_score(i)) for i in ids],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": source.bos_id(),
        "ggml.eos_token_id": source.eos_id(),
        "ggml.unknown_token_id": source.unk_id(),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_equals_the_library(
    open_vocabulary: Callable[..., GGUFCheckpoint], prefix: bool
) -> None:
    source = train_sentencepiece(add_dummy_prefix=prefix)
    metadata = sentencepiece_metadata(source) | {"ggml.add_space_prefix": prefix}
    mine = load(open_vocabulary(metadata))
    for text in STRINGS:
        if "\x00" in text:  # SentencePiece cuts text there
            continue
        ids = source.encode(text)
        assert mine.encode(text, add_special_tokens=False) == ids, text
        assert mine.decode(ids) == source.decode(ids), text
    assert mine.encode("a")[0] == source.bos_id()  # the default of this kind


def test_user_defined_tokens_of_spaces_are_runs_of_spaces(
    open_vocabulary: Callable[..., GGUFCheckpoint],
) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece())
    metadata["ggml.tokens"] += ["      ", "<tool>"]
    metadata["ggml.scores"] += [-1000.0, -1000.0]
    metadata["ggml.token_type"] += [4, 4]
    metadata["ggml.add_space_prefix"] = False
    mine = load(open_vocabulary(metadata))
    spaces = len(metadata["ggml.tokens"]) - 2
    assert mine.convert_tokens_to_ids("\u2581" * 6) == spaces
    ids = mine.encode("a<tool>b")
    assert spaces + 1 in ids
    assert mine.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_phi3_control_tokens_eat_the_space_behind_them(
    write_gguf: Callable[..., Path], decoder_metadata: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece())
    metadata["ggml.tokens"] += ["<|user|>", "<|endoftext|>"]
    metadata["ggml.scores"] += [0.0, 0.0]
    metadata["ggml.token_type"] += [3, 3]
    keys = {f"tokenizer.{key}": value for key, value in metadata.items()}
    tensors = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    path = write_gguf("phi3", decoder_metadata("phi3") | keys, tensors)
    mine = load(GGUFCheckpoint(path, tmp_path / "cache"))
    assert mine.encode("<|user|>\nfox") == mine.encode("<|user|>fox")
    assert mine.encode("<|endoftext|>\nfox") != mine.encode("<|endoftext|>fox")


# ---- real models -----------------------------------------------------------------------------

SPECIAL = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<bos>x<eos>", "<|endoftext|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "<table><td>x</td>",
    "<unused7>",
]  # fmt: skip


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["demo", "gemma-270m"])
def test_real_tokenizers_equal_what_transformers_makes_of_them(name: str, tmp_path: Path) -> None:
    path = demo_model_path(name)
    mine = load(GGUFCheckpoint(path, tmp_path))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if name == "demo":
        # transformers ignores that this vocabulary cuts off digits first (its tokenizer.json does,
        # and so does llama.cpp); it shows where a run of spaces meets a number.
        theirs.backend_tokenizer.pre_tokenizer = DIGITS
    assert_same(mine, theirs, STRINGS + SPECIAL)
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(mine, attribute) == getattr(theirs, attribute)
    assert len(mine) == len(theirs)
