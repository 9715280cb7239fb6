"""Choose one of several implementations of an operation.

An implementation says "not me" by raising `NotImplementedError` while it is traced; the next one
is then tried. Which ones are candidates depends on the platform the program is *lowered* for, so
compiling for a TPU on a machine without one picks the TPU kernel. Nothing here asks which devices
are present.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    name: what callers pass as `implementation=` to ask for exactly this one.
    function: called with the operation's arrays, in order.
    platforms: lowering platforms ("cpu", "tpu", "cuda", "rocm") it is for; None means every one.
    automatic: False keeps it out of the automatic choice; it then runs only when named.
    """

    name: str
    function: Callable
    platforms: tuple[str, ...] | None = None
    automatic: bool = True

    def serves(self, platform: str | None) -> bool:
        """Whether it may be chosen for `platform` (None: a platform nobody names)."""
        return self.automatic and (self.platforms is None or platform in self.platforms)


def deferred(module: str, function: str) -> Callable:
    """A function of a module that is imported when it is called.

    Pallas, and the kernels with it, take a fifth of the time of a server's imports; a CPU needs
    neither.
    """

    def call(*arrays: jax.Array | None, **options: object):
        return getattr(importlib.import_module(module), function)(*arrays, **options)

    return call


class NoImplementation(ExceptionGroup, NotImplementedError):
    """Every candidate refused the call; the group holds one refusal per candidate."""

    def derive(self, excs):
        return NoImplementation(self.message, excs)


def dispatch(
    op: str,
    implementations: Sequence[Implementation],
    *arrays: jax.Array | None,
    implementation: str | None = None,
):
    """Run the first of `implementations` that accepts `arrays`; earlier ones are preferred.

    Raises ValueError if `implementation` names none of them, and NoImplementation if all
    candidates refuse.
    """
    if implementation is not None:
        named = [each for each in implementations if each.name == implementation]
        if not named:
            known = ", ".join(each.name for each in implementations)
            raise ValueError(f"{op}: no implementation {implementation!r}; choose one of: {known}")
        return _first_that_accepts(op, named, "any platform", *arrays)

    platforms = {
        platform: None
        for each in implementations
        if each.automatic
        for platform in each.platforms or ()
    }

    def branch(platform: str | None) -> Callable:
        candidates = [each for each in implementations if each.serves(platform)]
        return partial(_first_that_accepts, op, candidates, platform or "this platform")

    if not platforms:
        return branch(None)(*arrays)
    return jax.lax.platform_dependent(
        *arrays, default=branch(None), **{platform: branch(platform) for platform in platforms}
    )


def _first_that_accepts(op: str, candidates: Sequence[Implementation], platform: str, *arrays):
    refusals = []
    for candidate in candidates:
        try:
            return candidate.function(*arrays)
        except NotImplementedError as refusal:
            refusal.add_note(f"refused by implementation {candidate.name!r}")
            refusals.append(refusal)
    if not refusals:
        raise NotImplementedError(f"{op}: no implementation exists for {platform}")
    names = ", ".join(each.name for each in candidates)
    raise NoImplementation(f"{op}: every implementation for {platform} refused ({names})", refusals)
