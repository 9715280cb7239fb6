"""`--only-run MODEL`: run the tests of one model alone, with real weights where they can be had.

MODEL is a family's name or a hub id: an example of a family, one of `tests/data/configs`, or a
folder `$JAXSERVE_MODELS/MODEL`. The environment variable ONLY_RUN does the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from model_defs.registry import Family, family_of, list_families

from .cases import CASES, GOLDENS, Case, golden_case, live_case

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "configs"
HERE = Path(__file__).parent


def model_asked_for(config: pytest.Config) -> str | None:
    return config.getoption("--only-run") or os.environ.get("ONLY_RUN") or None


def local_folder(hub_id: str) -> Path | None:
    """The folder of that name under $JAXSERVE_MODELS, where there is one with a config.json."""
    root = os.environ.get("JAXSERVE_MODELS")
    folder = Path(root) / hub_id if root else None
    return folder if folder and (folder / "config.json").is_file() else None


def family_asked_for(model: str) -> Family:
    """The family of a family's name or a hub id.

    Raises pytest.UsageError for one that nothing here knows.
    """
    for family in list_families():
        if model == family.name or model in family.examples:
            return family
    folder = local_folder(model)
    published = CONFIGS / f"{model.replace('/', '--')}.json"
    file = folder / "config.json" if folder else published
    if not file.is_file():
        raise pytest.UsageError(
            f"--only-run {model}: neither a family, nor an example of one, nor a published config "
            f"in tests/data/configs, nor a folder under $JAXSERVE_MODELS. Families: "
            f"{', '.join(family.name for family in list_families())}."
        )
    return family_of(json.loads(file.read_text()))


def is_about(item: pytest.Item, model: str, family: Family) -> bool:
    """Whether a test is one of `model`'s, by what it is parametrised with."""
    spec = getattr(item, "callspec", None)
    if spec is None or HERE not in item.path.parents:
        return False
    values = dict(spec.params)
    if "hub_id" in values:
        return "/" in model
    if "repository" in values:  # a hub id means itself; a family, all of its published configs
        name = values["repository"]
        config = json.loads((CONFIGS / f"{name.replace('/', '--')}.json").read_text())
        return name == model or ("/" not in model and family_of(config) is family)
    if "case" in values:
        registered, which = values["case"]
        if registered is None:  # a stored golden
            registered = family_of(json.loads((which / "config.json").read_text()))
        return registered is family
    if "golden" in values:
        config = json.loads((GOLDENS / values["golden"] / "config.json").read_text())
        return family_of(config) is family
    return values.get("family") is family


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """Each checkpoint in turn; what was compiled for it is dropped with it.

    Every compiled program holds some 400 memory mappings, of which a process may have 65,530.
    """
    family, which = request.param
    if family is None:
        yield golden_case(which)
    else:
        yield live_case(family, which, tmp_path_factory.mktemp(family.name))
    jax.clear_caches()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `hub_id` the model asked for."""
    if "hub_id" in metafunc.fixturenames:
        metafunc.parametrize("hub_id", [model_asked_for(metafunc.config) or "none"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one model's tests where one is asked for; else leave out those that need a hub id."""
    model = model_asked_for(config)
    if model is None:
        kept = [i for i in items if "hub_id" not in getattr(i, "fixturenames", ())]
    else:
        family = family_asked_for(model)
        kept = [item for item in items if is_about(item, model, family)]
    if gone := [item for item in items if item not in set(kept)]:
        config.hook.pytest_deselected(items=gone)
        items[:] = kept
