"""The table of families: from an architecture's name to a spec and the rules for its weights.

Three ways in, all ending in the same table:

* `@register("MyForCausalLM", ...)` in a file of this package; found by importing every module here.
* `ModelRegistry.models["MyForCausalLM"] = family` from anywhere, before the engine starts.
* an entry point in the group `jaxserve.models` of an installed package, naming a module to import
  (its `@register` calls run) or a `Family`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_defs.decoder import DecoderSpec, Task
from model_defs.hf_config import HFConfig, UnsupportedConfig
from model_defs.weights import Rule

ENTRY_POINT_GROUP = "jaxserve.models"

Reference = Literal["transformers", "original"]
Build = Callable[[HFConfig], DecoderSpec]
Weights = Sequence[Rule] | Callable[[HFConfig], Sequence[Rule]]


@dataclass(frozen=True, eq=False)
class Family:
    """A model family; two are equal only when they are the same object.

    Attributes:
        name: of the family, for tables.
        architectures: names in `config.json`.
        build: config -> spec.
        weights: rules, or a function of the config that gives them.
        ignored: config keys that do not change this family's forward pass.
        examples: hub ids.
        tiny: fields of a small config for tests.
        home: the file it is declared in, for errors.
        bfloat16_tolerance: largest error of the outputs of its `tiny` models in bfloat16, as a root
            mean square in standard deviations of the outputs; of a model with experts, that of the
            best three quarters of the tokens, because where two experts score nearly the same
            rounding decides which of them a token goes to.
        task: what its models are for.
        reference: what the tests compare it with: transformers' class, or stored outputs of the
            original code or a transcription of it; None: they do not.
    """

    name: str
    architectures: tuple[str, ...]
    build: Build
    weights: Weights
    ignored: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    tiny: tuple[Mapping[str, Any], ...] = ()
    home: str = ""
    bfloat16_tolerance: float = 0.02
    task: Task = "generate"
    reference: Reference | None = None

    def spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """Build the spec of a `config.json` under strict reading.

        Raises:
            UnsupportedConfig: a key is missing, has an unimplemented value, or was not read.
        """
        cfg = self._config(config)
        spec = self.build(cfg)
        for key in self.ignored:
            cfg.get(key)
        cfg.check_all_read(self.home)
        return spec

    def rules(self, config: Mapping[str, Any]) -> tuple[Rule, ...]:
        """The weight rules of a `config.json`."""
        return self.weight_rules(self._config(config))

    def weight_rules(self, cfg: HFConfig) -> tuple[Rule, ...]:
        """The weight rules, for those who have a config reader already."""
        return tuple(self.weights(cfg) if callable(self.weights) else self.weights)

    def _config(self, config: Mapping[str, Any]) -> HFConfig:
        return HFConfig(config, (config.get("architectures") or [self.architectures[0]])[0])


class _Registry:
    """Architecture name -> family. The last to register an architecture has it."""

    def __init__(self) -> None:
        self._models: dict[str, Family] = {}
        self._discovered = False

    @property
    def models(self) -> MutableMapping[str, Family]:
        """The table itself, complete, so that what outside code puts into it stays."""
        self.discover()
        return self._models

    def discover(self) -> None:
        """Import every module of this package and every installed entry point, once.

        Raises:
            ImportError: an entry point cannot be loaded.
        """
        if self._discovered:
            return
        self._discovered = True  # first: a module that is being imported may look here
        try:
            package = importlib.import_module("model_defs")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"model_defs.{module.name}")
            for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                loaded = _load(entry)
                if isinstance(loaded, Family):
                    self.add(loaded)
        except BaseException:
            self._discovered = False
            raise

    def add(self, family: Family) -> None:
        """Enter `family` under each of its architectures."""
        for architecture in family.architectures:
            self._models[architecture] = family

    def built_by(self, build: Build) -> Family:
        """The family, registered already, whose builder is `build`."""
        return next(family for family in self._models.values() if family.build is build)


def _load(entry: importlib.metadata.EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:
        package = entry.dist.name if entry.dist else "an installed package"
        raise ImportError(
            f"{package}: the entry point {entry.name} = {entry.value!r} in the group "
            f"{ENTRY_POINT_GROUP!r} cannot be loaded: {type(error).__name__}: {error}. "
            f"Repair the package or uninstall it."
        ) from error


ModelRegistry = _Registry()


def register(
    *architectures: str,
    weights: Weights,
    ignored: Sequence[str] = (),
    examples: Sequence[str] = (),
    tiny: Sequence[Mapping[str, Any]] = (),
    reference: Reference | None = None,
    bfloat16_tolerance: float = Family.bfloat16_tolerance,
) -> Callable[[Build], Build]:
    """Declare a family: decorate the function that turns its config into a spec.

    Args:
        reference: as in `Family`; without it transformers, where there are `tiny` configs.
        bfloat16_tolerance: as in `Family`.
    """

    def add(build: Build) -> Build:
        ModelRegistry.add(
            Family(
                name=build.__name__,
                architectures=architectures,
                build=build,
                weights=weights,
                ignored=tuple(ignored),
                examples=tuple(examples),
                tiny=tuple(tiny),
                reference=reference or ("transformers" if tiny else None),
                bfloat16_tolerance=bfloat16_tolerance,
                home=build.__module__.replace(".", "/") + ".py",
            )
        )
        return build

    return add


def get_family(architecture: str) -> Family:
    """The family that serves `architecture`.

    Raises:
        UnsupportedConfig: no family does; the message lists those that exist.
    """
    if architecture not in ModelRegistry.models:
        raise UnsupportedConfig(
            f"architecture {architecture!r} is not known. Known: "
            f"{', '.join(sorted(ModelRegistry.models))}. A new one is one file: "
            f"see model_defs/README.md."
        )
    return ModelRegistry.models[architecture]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family named by a `config.json`'s `architectures`."""
    names = config.get("architectures") or []
    if not names:
        raise UnsupportedConfig(
            "config.json has no 'architectures'. Add the class name the checkpoint was saved "
            'with, for example "architectures": ["LlamaForCausalLM"].'
        )
    return get_family(names[0])


def list_families() -> tuple[Family, ...]:
    """Every family once, by name."""
    return tuple(sorted(set(ModelRegistry.models.values()), key=lambda f: f.name))
