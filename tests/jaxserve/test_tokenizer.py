"""Encoding, chat templates, incremental decoding and stop strings, on tokenizers made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import InvalidRequest
from jaxserve.tokenizer import (
    StopStrings,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    load_chat_template,
)

TEXTS = [
    "Paris is the capital of France.",
    "  two leading spaces, a tab\t and\nlines\n",
    "naïve café, 東京, Ελληνικά, עברית, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 and 🇫🇷 flags",
    "a replacement \ufffd in the text itself",
    "",
]


@pytest.fixture(scope="module")
def byte_level(byte_tokenizer_dir: Path) -> Tokenizer:
    """Byte-level BPE, one token per byte: every other character is spread over tokens."""
    return Tokenizer.load(byte_tokenizer_dir)


@pytest.fixture(scope="module")
def piece_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece-like tokenizer: ▁ for spaces, bytes for unknown characters, a BOS."""
    words = ["▁the", "▁capital", "▁of", "▁is", "▁Paris", "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    specials = ["<unk>", "<s>", "</s>", "<tool>"]
    pieces = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = merges_of(words, pieces)
    model = tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("piece-tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 40}), "utf-8"
    )
    return Tokenizer.load(folder)


def merges_of(words: list[str], pieces: list[str]) -> list[tuple[str, str]]:
    """Add to `pieces` what BPE needs on the way from letters to `words`; return the merges."""
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
            for piece in (*pair, word[:end]):
                if piece not in pieces:
                    pieces.append(piece)
    return merges


def streamed(tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None) -> str:
    decoder = StreamDecoder(tokenizer, prompt or [])
    return "".join([*(decoder.push([i]) for i in token_ids), decoder.finish()])


def pieces_of(token_ids: list[int], size: int) -> list[list[int]]:
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


@pytest.fixture(scope="module", params=["byte_level", "piece_level"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


# ---- incremental decoding --------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_the_text_decoded_at_once(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, token_ids) == tokenizer.decode(token_ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_streaming_loses_and_adds_nothing(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, token_ids) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("text", TEXTS[:4])
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    so_far = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        so_far += decoder.push([token_id])
        assert text.startswith(so_far)


def test_a_character_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    decoder = StreamDecoder(byte_level)
    assert [decoder.push([i]) for i in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_become_replacement_characters(
    byte_level: Tokenizer, token_ids: list[int]
) -> None:
    assert streamed(byte_level, token_ids) == bytes(token_ids).decode("utf-8", "replace")


def test_endless_garbage_is_still_shown(byte_level: Tokenizer) -> None:
    decoder = StreamDecoder(byte_level)
    shown = "".join(decoder.push([0xFF]) for _ in range(500))
    assert len(shown) > 400
    assert (shown + decoder.finish()).count("\ufffd") == 500


def test_many_tokens_at_once_give_the_same_text(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for size in (3, 7, 50):
        decoder = StreamDecoder(tokenizer)
        parts = [decoder.push(part) for part in pieces_of(token_ids, size)]
        assert "".join(parts) + decoder.finish() == text
    assert StreamDecoder(tokenizer).finish(token_ids) == text


def test_an_answer_keeps_the_space_after_the_prompt(piece_level: Tokenizer) -> None:
    prompt = piece_level.encode("the capital is")
    answer = piece_level.encode("Paris", add_special_tokens=False)
    assert streamed(piece_level, answer, prompt) == " Paris"
    assert streamed(piece_level, answer) == "Paris"


def test_a_prompt_that_ends_inside_a_character_is_completed(byte_level: Tokenizer) -> None:
    half, rest = list("é".encode()[:1]), list("é".encode()[1:])
    assert streamed(byte_level, rest, half) == "é"


def test_special_tokens_have_no_text(piece_level: Tokenizer) -> None:
    the, of = (piece_level.encode(w, add_special_tokens=False)[0] for w in ("the", "of"))
    assert streamed(piece_level, [the, 3, of, 2]) == "the of"


def test_work_per_token_does_not_grow(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    token_ids = tokenizer.encode("the capital of é is 東京. " * 60, add_special_tokens=False)
    text = streamed(tokenizer, [*token_ids, *[2] * 300, *token_ids])
    assert len(text) > 2000
    assert max(sizes) <= 24
    assert len(sizes) <= 1.3 * (2 * len(token_ids)) + 10


# ---- stop strings ----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n", max_size=40),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_that_is_complete(
    text: str, stop: list[str]
) -> None:
    stops = StopStrings(stop)
    shown = ""
    for letter in text:
        shown += stops.push(letter)
    shown += stops.flush() if stops.matched is None else ""
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if not ends:
        assert (shown, stops.matched) == (text, None)
        return
    complete = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
    assert shown == text[: ends[0] - len(complete)]
    assert stops.matched == complete


def test_a_possible_beginning_is_held_back_and_released() -> None:
    stops = StopStrings(["\nUser:"])
    assert [stops.push(part) for part in ("Hi\n", "Us", "ual", "\nUser", ":")] == [
        "Hi",
        "",
        "\nUsual",
        "",
        "",
    ]
    assert stops.matched == "\nUser:"
    assert stops.push("more") == ""


def test_a_beginning_that_ends_the_text_is_text() -> None:
    stops = StopStrings(["###"])
    assert stops.push("a##") + stops.flush() == "a##"


# ---- loading, eos, chat ----------------------------------------------------------------------


def test_eos_ids_come_from_tokenizer_and_generation_config(
    piece_level: Tokenizer, byte_level: Tokenizer
) -> None:
    assert piece_level.eos_ids == {2, 3}
    assert byte_level.eos_ids == {258}


def test_sampling_defaults_come_from_the_generation_config(
    piece_level: Tokenizer, byte_level: Tokenizer
) -> None:
    assert piece_level.default_sampling == {"temperature": 0.6, "top_k": 40}
    assert byte_level.default_sampling == {}


def test_chat_has_one_bos(piece_level: Tokenizer) -> None:
    plain = piece_level.encode("the capital")
    chat = piece_level.encode_chat([{"role": "user", "content": "the capital"}])
    assert plain.count(1) == chat.count(1) == 1
    assert chat[0] == 1


def test_chat_template_is_rendered_up_to_the_answer(byte_level: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert byte_level.render_chat(messages) == (
        "<bos><|system|>Be brief.<eos><|user|>Hi<eos><|assistant|>"
    )
    assert byte_level.encode_chat(messages)[:2] == [257, 259]


def test_chat_template_given_replaces_the_checkpoints(
    byte_tokenizer_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}", "utf-8")
    messages = [{"role": "user", "content": "Hi"}]
    from_file = Tokenizer.load(byte_tokenizer_dir, chat_template=str(file))
    assert from_file.render_chat(messages) == "[Hi]"
    inline = Tokenizer.load(byte_tokenizer_dir).render_chat(messages, chat_template="{{ 1 + 1 }}")
    assert inline == "2"


def test_no_chat_template_names_the_flag(
    make_byte_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(make_byte_tokenizer(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="--chat-template"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_a_template_may_refuse_messages(byte_level: Tokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        byte_level.render_chat([{"role": "user", "content": "Hi"}], chat_template=template)


@pytest.mark.parametrize("wrong", ["no-such-file.jinja", "{% for m in messages %}", "{{ oops"])
def test_a_wrong_chat_template_is_one_clear_error(wrong: str) -> None:
    with pytest.raises(TokenizerError, match="--chat-template"):
        load_chat_template(wrong)


def test_a_missing_or_empty_folder_names_the_flag(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(TokenizerError, match="--tokenizer-path"):
            Tokenizer.load(folder)


def test_text_that_is_not_unicode_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        byte_level.encode("\ud800")
