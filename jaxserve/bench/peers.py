"""What other engines need for the same workloads; the figures are in peers.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PeerModel:
    """A model that peers were measured with.

    Attributes:
        suite: name of the preset that measures the same here.
        config: path of the model's config.json.
        startup_s: peer -> seconds until it serves, compilation included.
        seconds: case -> peer -> seconds of the whole call.
        serve: request rate -> peer -> what its server did.
    """

    name: str
    suite: str
    config: str
    architecture: str
    num_parameters: int
    startup_s: Mapping[str, float]
    seconds: Mapping[str, Mapping[str, float]]
    serve: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Peers:
    """The whole file.

    Attributes:
        card: JAX's name of the device that all figures were measured on.
        versions: peer -> its version.
        settings: fields of `EngineConfig` that make a run comparable.
    """

    card: str
    date: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    models: tuple[PeerModel, ...]

    def model_like(self, architecture: str, num_parameters: int) -> PeerModel | None:
        """The model of this architecture and size, under whatever name it is served."""
        for model in self.models:
            if (model.architecture, model.num_parameters) == (architecture, num_parameters):
                return model
        return None

    @property
    def suites(self) -> dict[str, PeerModel]:
        return {model.suite: model for model in self.models}


@cache
def load_peers() -> Peers:
    """Read peers.json."""
    data = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))
    models = tuple(
        PeerModel(**{**model, "config": str(HERE / "models" / model["config"])})
        for model in data["models"]
    )
    return Peers(data["card"], data["date"], data["versions"], data["settings"], models)


def ratio_to_best(ours_s: float, peers_s: Mapping[str, float]) -> float | None:
    """How many times faster than the fastest peer; None where no peer has a figure."""
    return round(min(peers_s.values()) / ours_s, 3) if peers_s else None
