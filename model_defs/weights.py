"""How a checkpoint's tensors map to the canonical ones: reversible rules, and the plan they make.

A rule changes names and cuts tensors, and knows its inverse. Rules act on headers only; what they
produce is an expression per tensor (`Source`, `Cut`, `Join`), which reads no more of the checkpoint
than asked for:

    checkpoint (HF names)  --rules forward-->  canonical names   (loading, conversion)
    checkpoint (HF names)  <--rules inverse--  canonical names   (export)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_CANDIDATES = 100

Index = tuple[slice, ...]
Read = Callable[[str, Index], np.ndarray]


class WeightPlanError(ValueError):
    """The checkpoint's tensors are not the ones the model is made from."""


class Expr(Protocol):
    """A tensor that can be read by box, made from stored tensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self, index: Index, read: Read) -> np.ndarray: ...

    def sources(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Source:
    """A stored tensor as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: Index, read: Read) -> np.ndarray:
        return read(self.name, index)

    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cut:
    """Rows `start .. stop` of the first dimension."""

    of: Expr
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.of.shape[1:])

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        lo, hi, _ = index[0].indices(self.stop - self.start)
        return self.of.read((slice(self.start + lo, self.start + hi), *index[1:]), read)

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.of}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Join:
    """Tensors one after another along the first dimension."""

    parts: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        lo, hi, _ = index[0].indices(self.shape[0])
        blocks, start = [], 0
        for part in self.parts:
            stop = start + part.shape[0]
            if lo < stop and hi > start:
                box = slice(max(lo, start) - start, min(hi, stop) - start)
                blocks.append(part.read((box, *index[1:]), read))
            start = stop
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.sources())

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


Tensors = dict[str, Expr]


class Rule(Protocol):
    """A reversible change of a set of named tensors."""

    def forward(self, tensors: Tensors) -> Tensors: ...

    def inverse(self, tensors: Tensors) -> Tensors: ...


def _renamed(tensors: Tensors, pattern: str, new: str) -> Tensors:
    out: Tensors = {}
    for name, expr in tensors.items():
        renamed = re.sub(pattern, new, name)
        if renamed in out:
            raise WeightPlanError(
                f"{renamed} is both {out[renamed]} and {expr}. The checkpoint holds it twice, "
                f"or the family's rules give two tensors one name."
            )
        out[renamed] = expr
    return out


@dataclass(frozen=True)
class Subtree:
    """Everything under `hf` lives under `ours`: `model` <-> `decoder`."""

    hf: str
    ours: str

    def forward(self, tensors: Tensors) -> Tensors:
        return _renamed(tensors, rf"^{re.escape(self.hf)}\.", f"{self.ours}.")

    def inverse(self, tensors: Tensors) -> Tensors:
        return _renamed(tensors, rf"^{re.escape(self.ours)}\.", f"{self.hf}.")


@dataclass(frozen=True)
class Rename:
    """Whole path segments `hf` <-> `ours`, anywhere under `under`."""

    hf: str
    ours: str
    under: str = "decoder"

    def forward(self, tensors: Tensors) -> Tensors:
        return self._swap(tensors, self.hf, self.ours)

    def inverse(self, tensors: Tensors) -> Tensors:
        return self._swap(tensors, self.ours, self.hf)

    def _swap(self, tensors: Tensors, old: str, new: str) -> Tensors:
        pattern = rf"^({re.escape(self.under)}\.(?:.*\.)?){re.escape(old)}(?=\.|$)"
        return _renamed(tensors, pattern, rf"\g<1>{new}")


@dataclass(frozen=True)
class Split:
    """One stored tensor `hf` holds several, one after another along its first dimension.

    Acts on every `PREFIX.hf.LEAF` (weights and biases alike).

    Args:
        into: names beside `hf`, in the order in which they are stored.
        sizes: rows of each.
    """

    hf: str
    into: tuple[str, ...]
    sizes: tuple[int, ...]

    def forward(self, tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, expr in tensors.items():
            match = re.match(rf"^(.*\.)?{re.escape(self.hf)}\.([^.]+)$", name)
            if match is None:
                out[name] = expr
                continue
            # Whatever the number of rows, the cuts cover all of them: a tensor of the wrong size is
            # then reported by `plan` as a mis-shaped part, together with every other problem.
            rows, start = expr.shape[0], 0
            for i, (part, size) in enumerate(zip(self.into, self.sizes, strict=True)):
                stop = rows if i == len(self.into) - 1 else min(start + size, rows)
                out[f"{match[1] or ''}{part}.{match[2]}"] = Cut(expr, start, stop)
                start = stop
        return out

    def inverse(self, tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, expr in tensors.items():
            match = re.match(r"^(.*\.)?([^.]+)\.([^.]+)$", name)
            if match is None or match[2] not in self.into:
                out[name] = expr
            elif match[2] == self.into[0]:
                prefix, leaf = match[1] or "", match[3]
                parts = tuple(tensors[f"{prefix}{p}.{leaf}"] for p in self.into)
                out[f"{prefix}{self.hf}.{leaf}"] = Join(parts)
        return out


@dataclass(frozen=True)
class Tie:
    """`tensor` repeats `of` when it is stored at all; it is rebuilt on export if it was stored."""

    tensor: str
    of: str

    def forward(self, tensors: Tensors) -> Tensors:
        return {name: expr for name, expr in tensors.items() if name != self.tensor}

    def inverse(self, tensors: Tensors) -> Tensors:
        return {**tensors, self.tensor: tensors[self.of]} if self.of in tensors else tensors


@dataclass(frozen=True)
class Ignore:
    """Stored tensors that are no weights (buffers old checkpoints carry). Not exported again."""

    pattern: str

    def forward(self, tensors: Tensors) -> Tensors:
        return {name: e for name, e in tensors.items() if not re.fullmatch(self.pattern, name)}

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


# How nearly every checkpoint names the two halves of a layer.
HF_BLOCK_NAMES: tuple[Rule, ...] = (
    Rename("embed_tokens", "embed"),
    Rename("self_attn", "mixer"),
    Rename("mlp", "ffn"),
)


@dataclass(frozen=True)
class Entry:
    """One canonical tensor of a plan."""

    name: str
    expr: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        return self.expr.shape


@dataclass(frozen=True)
class WeightPlan:
    """Where every canonical tensor comes from.

    Attributes:
        entries: by canonical name.
        dropped: stored tensors that are deliberately not used.
    """

    entries: Mapping[str, Entry]
    dropped: tuple[str, ...]

    def read(self, name: str, index: Index, read: Read) -> np.ndarray:
        """Read a box of a canonical tensor through `read(stored name, box)`."""
        return self.entries[name].expr.read(index, read)


def plan(
    rules: Sequence[Rule],
    headers: Mapping[str, tuple[tuple[int, ...], str]],
    expected: Mapping[str, tuple[int, ...]],
) -> WeightPlan:
    """Match a checkpoint's headers with the tensors a model is made from, touching no data.

    Args:
        rules: of the family.
        headers: stored name -> (shape, dtype).
        expected: canonical name -> shape.

    Raises:
        WeightPlanError: naming every missing, unread and mis-shaped tensor at once.
    """
    tensors: Tensors = {n: Source(n, tuple(s), d) for n, (s, d) in headers.items()}
    for rule in rules:
        tensors = rule.forward(tensors)
    problems = _unmatched(rules, expected, tensors)
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(
                f"  mis-shaped: {name} is {list(tensors[name].shape)} (from {tensors[name]}), "
                f"the config asks for {list(shape)}"
            )
    if problems:
        raise WeightPlanError(
            f"{len(problems)} tensors do not fit the model:\n" + "\n".join(problems) + "\n"
            "The checkpoint and its config.json disagree, or the family's rules lack a case."
        )
    used = {s for name in expected for s in tensors[name].sources()}
    entries = {name: Entry(name, tensors[name]) for name in expected}
    return WeightPlan(entries, tuple(sorted(set(headers) - used)))


def _unmatched(
    rules: Sequence[Rule], expected: Mapping[str, tuple[int, ...]], tensors: Tensors
) -> list[str]:
    """A line for each tensor that only the model or only the checkpoint has."""
    missing = [name for name in expected if name not in tensors]
    unread = [name for name in tensors if name not in expected]
    exported = export(rules, {name: (shape, "") for name, shape in expected.items()})
    stored = {source: name for name, expr in exported.items() for source in expr.sources()}
    return [
        f"  missing: {name} {list(expected[name])} (stored as {stored[name]})"
        f"{_nearest(name, unread)}"
        for name in missing
    ] + [
        f"  unread: {name} {list(tensors[name].shape)} (from {tensors[name]})"
        f"{_nearest(name, missing)}"
        for name in unread
    ]


def _nearest(name: str, names: Sequence[str]) -> str:
    if len(names) > MAX_CANDIDATES:  # nothing fits at all; a guess for each would take minutes
        return ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    return f"; nearest: {close[0]}" if close else ""


def export(
    rules: Sequence[Rule],
    canonical: Mapping[str, tuple[tuple[int, ...], str]],
    names: Iterable[str] | None = None,
) -> dict[str, Expr]:
    """The rules backwards: stored name -> expression over canonical tensors.

    Args:
        names: the stored names wanted; without them every name the rules give except tied copies.
    """
    tensors: Tensors = {n: Source(n, tuple(s), d) for n, (s, d) in canonical.items()}
    tied = set()
    for rule in reversed(rules):
        tensors = rule.inverse(tensors)
        tied |= {rule.tensor} if isinstance(rule, Tie) else set()
    if names is None:
        return {name: expr for name, expr in tensors.items() if name not in tied}
    return {name: tensors[name] for name in names if name in tensors}
