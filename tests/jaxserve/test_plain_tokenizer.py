"""A tokenizer without transformers gives what transformers gives, or leaves the folder to it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jaxserve.plain_tokenizer import PlainTokenizer, load_hf_tokenizer
from jaxserve.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, world",
    " two  spaces\n",
    "naïve 東京 👩‍👩‍👧",
    "a<eos>b<bos>",
    "<|user|> <|",
    "\ufffd",
]
CHATML = (
    "{% for message in messages %}\n{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ bos_token }}system<eos>\n{% endif %}\n  {% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}{{ message['role'] + '\n' + message['content'] }}"
    "{{ eos_token }}\n{%- if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}{{ tools }}{{ documents }}"
    "{{ unk_token }}"
)
CHATS = [
    [{"role": "user", "content": "Hi <eos> there"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": " x\n"}],
]
MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path, make_byte_tokenizer: MakeFolder) -> MakeFolder:
    """Return a function that writes a plain folder with these changes to its config."""

    def make(changes: Mapping[str, Any] | None = None) -> Path:
        folder = make_byte_tokenizer(tmp_path / "plain")
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(changes or {})), "utf-8")
        return folder

    return make


def load_plain(folder: Path) -> PlainTokenizer:
    plain = PlainTokenizer.load(folder)
    assert plain is not None
    return plain


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": False, "add_eos_token": False, "tokenizer_class": "TokenizersBackend"},
        {"chat_template": CHATML, "unk_token": None, "pad_token": None},
    ],
)
def test_it_does_what_transformers_does(make_folder: MakeFolder, changes: dict[str, Any]) -> None:
    folder = make_folder(changes)
    plain, full = load_plain(folder), load_hf_tokenizer(folder)
    assert plain.eos_token_id == full.eos_token_id
    assert plain.chat_template == full.chat_template
    assert {i: str(t) for i, t in plain.added_tokens_decoder.items()} == {
        i: str(t) for i, t in full.added_tokens_decoder.items()
    }
    for text in TEXTS:
        for special in (True, False):
            ids = full.encode(text, add_special_tokens=special, verbose=False)
            assert plain.encode(text, add_special_tokens=special) == ids
            assert plain.backend_tokenizer.decode(ids) == full.backend_tokenizer.decode(ids)
    how = {"tokenize": False, "add_generation_prompt": True}
    for chat in CHATS:
        for template in (None, CHATML, "{{ messages | tojson }}", "{{ messages[0].content }}"):
            expected = full.apply_chat_template(chat, chat_template=template, **how)
            assert plain.apply_chat_template(chat, chat_template=template, **how) == expected


def test_messages_with_more_fields_are_rendered_by_transformers(make_folder: MakeFolder) -> None:
    folder = make_folder({"chat_template": "{{ messages[0].reasoning_content }}"})
    chat = [{"role": "assistant", "content": "a", "reasoning": "because"}]
    tokenizer = Tokenizer.load(folder)
    assert isinstance(tokenizer.hf, PlainTokenizer)
    assert tokenizer.render_chat(chat) == "because"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"some_new_key": 1},
        {"add_bos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"eos_token": {"content": "<eos>", "lstrip": True}},
        {"eos_token": "<new>"},
        {"chat_template": "{{ messages | tojson }}"},
        {"chat_template": [{"name": "default", "template": "x"}]},
    ],
)
def test_what_it_does_not_know_is_left_to_transformers(
    make_folder: MakeFolder, changes: dict[str, Any]
) -> None:
    assert PlainTokenizer.load(make_folder(changes)) is None


def test_folders_with_other_files_or_a_changed_backend_are_left_to_transformers(
    make_folder: MakeFolder,
) -> None:
    folder = make_folder()
    load_plain(folder)
    for name in ("config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text("{}", "utf-8")
        assert PlainTokenizer.load(folder) is None
        (folder / name).unlink()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    assert PlainTokenizer.load(folder) is None


def test_a_plain_folder_is_served_without_importing_transformers(make_folder: MakeFolder) -> None:
    code = (
        "import sys; from jaxserve.tokenizer import Tokenizer; "
        "t = Tokenizer.load(sys.argv[1]); t.encode('x'); "
        "t.render_chat([{'role': 'user', 'content': 'x'}]); sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(make_folder())], check=False)
    assert done.returncode == 0


def test_the_warning_about_pytorch_is_not_shown(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_hf_tokenizer(make_folder())
    logger, shown = logging.getLogger("transformers"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.getMessage()))
    logger.addHandler(handler)
    try:
        logger.warning("PyTorch was not found. Models won't be available.")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert shown == ["something else"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"repetition_penalty": 1.1, "temperature": 0.7}, "repetition_penalty=1.1"),
        ({"num_beams": 4, "min_length": 3}, "num_beams=4, min_length=3"),
        ({"repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None, "top_k": 5}, None),
    ],
)
def test_settings_that_are_not_applied_are_told(
    make_folder: MakeFolder,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    told: str | None,
) -> None:
    with caplog.at_level(logging.WARNING, "jaxserve.tokenizer"):
        Tokenizer.load(make_folder(), generation_config=settings)
    if told is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert f"generation_config sets {told}, which is not applied" in record.getMessage()
