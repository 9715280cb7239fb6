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
class GroupCut:
    """Rows `start .. stop` of each of `groups` equal runs of rows of the first dimension."""

    of: Expr
    groups: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * (self.stop - self.start), *self.of.shape[1:])

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        size, stride = self.stop - self.start, self.of.shape[0] // self.groups
        rows = np.arange(*index[0].indices(self.shape[0]))
        rows = rows // size * stride + self.start + rows % size
        if not rows.size:
            return self.of.read((slice(0, 0), *index[1:]), read)
        first = int(rows[0])
        block = self.of.read((slice(first, int(rows[-1]) + 1), *index[1:]), read)
        return block[rows - first]

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.of}[{self.start}:{self.stop} of each of {self.groups} groups]"


@dataclass(frozen=True)
class GroupJoin:
    """The inverse of `GroupCut`: in each of `groups` runs, rows of every part in turn."""

    parts: tuple[Expr, ...]
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        lo, hi, _ = index[0].indices(self.shape[0])
        stride = self.shape[0] // self.groups
        first, last = lo // stride, -(-hi // stride)
        blocks = []
        for part in self.parts:
            size = part.shape[0] // self.groups
            block = part.read((slice(first * size, last * size), *index[1:]), read)
            blocks.append(block.reshape(last - first, size, *block.shape[1:]))
        whole = np.concatenate(blocks, axis=1)
        whole = whole.reshape(-1, *whole.shape[2:])
        return whole[lo - first * stride : hi - first * stride]

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.sources())

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts)) + f" in {self.groups} groups"


@dataclass(frozen=True)
class Item:
    """Entry `place` of the first dimension, which goes away."""

    of: Expr
    place: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[1:]

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        return self.of.read((slice(self.place, self.place + 1), *index), read)[0]

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.of}[{self.place}]"


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape along a new first dimension."""

    parts: tuple[Expr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        return np.stack([part.read(index[1:], read) for part in self.parts[index[0]]])

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.sources())

    def __str__(self) -> str:
        return f"stack({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Transposed:
    """The last two dimensions swapped."""

    of: Expr

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-2], self.of.shape[-1], self.of.shape[-2])

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def read(self, index: Index, read: Read) -> np.ndarray:
        return self.of.read((*index[:-2], index[-1], index[-2]), read).swapaxes(-1, -2)

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.of}.T"


@dataclass(frozen=True)
class Dequantised:
    """A matrix stored in few bits, times the scale of each of its blocks; float32."""

    of: Expr
    scale: Expr
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> str:
        return "float32"

    def read(self, index: Index, read: Read) -> np.ndarray:
        places = [
            np.arange(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)
        ]
        blocks = [place // size for place, size in zip(places, self.block, strict=True)]
        box = tuple(slice(int(b[0]), int(b[-1]) + 1) if b.size else slice(0, 0) for b in blocks)
        rows, columns = (b - part.start for b, part in zip(blocks, box, strict=True))
        scale = self.scale.read(box, read).astype(np.float32)
        return self.of.read(index, read).astype(np.float32) * scale[rows[:, None], columns]

    def sources(self) -> tuple[str, ...]:
        return (*self.of.sources(), *self.scale.sources())

    def __str__(self) -> str:
        return f"{self.of} * {self.scale}"


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


def _under(prefix: str) -> str:
    return rf"^{re.escape(prefix)}\." if prefix else "^"


@dataclass(frozen=True)
class Subtree:
    """Everything under `hf` lives under `ours`: `model` <-> `decoder`.

    With an empty `hf` everything stored does (checkpoints of a bare decoder).
    """

    hf: str
    ours: str

    def forward(self, tensors: Tensors) -> Tensors:
        return _renamed(tensors, _under(self.hf), f"{self.ours}.")

    def inverse(self, tensors: Tensors) -> Tensors:
        return _renamed(tensors, _under(self.ours), f"{self.hf}." if self.hf else "")


@dataclass(frozen=True)
class Bare:
    """A bare decoder: what other checkpoints keep under `prefix` is stored without it.

    Checkpoints that have the prefix all the same are taken as they are.
    """

    prefix: str

    def is_kept_by(self, names: Iterable[str]) -> bool:
        """Whether these stored names have the prefix."""
        return any(name.startswith(f"{self.prefix}.") for name in names)

    def forward(self, tensors: Tensors) -> Tensors:
        if self.is_kept_by(tensors):
            return tensors
        return {f"{self.prefix}.{name}": expr for name, expr in tensors.items()}

    def inverse(self, tensors: Tensors) -> Tensors:
        return {name.removeprefix(f"{self.prefix}."): expr for name, expr in tensors.items()}


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
        sizes: rows of each; of each group's share where there are several groups.
        groups: the stored rows are that many runs, each holding a share of every part.
    """

    hf: str
    into: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def forward(self, tensors: Tensors) -> Tensors:
        pattern = re.compile(rf"^(.*\.)?{re.escape(self.hf)}\.([^.]+)$")
        out: Tensors = {}
        for name, expr in tensors.items():
            match = pattern.match(name)
            if match is None:
                out[name] = expr
                continue
            for part, piece in zip(self.into, self._pieces(expr), strict=True):
                out[f"{match[1] or ''}{part}.{match[2]}"] = piece
        return out

    def _pieces(self, expr: Expr) -> list[Expr]:
        # Whatever the number of rows, the cuts cover all of them: a tensor of the wrong size is
        # then reported by `plan` as a mis-shaped part, together with every other problem.
        rows, start, pieces = expr.shape[0], 0, []
        grouped = self.groups > 1 and rows == self.groups * sum(self.sizes)
        for i, size in enumerate(self.sizes):
            stop = start + size
            if not grouped:
                stop = rows if i == len(self.sizes) - 1 else min(stop, rows)
            pieces.append(
                GroupCut(expr, self.groups, start, stop) if grouped else Cut(expr, start, stop)
            )
            start = stop
        return pieces

    def inverse(self, tensors: Tensors) -> Tensors:
        names = "|".join(map(re.escape, sorted(self.into, key=len, reverse=True)))
        pattern = re.compile(rf"^(.*?\.)??({names})\.([^.]+)$")
        out: Tensors = {}
        for name, expr in tensors.items():
            match = pattern.match(name)
            if match is None:
                out[name] = expr
            elif match[2] == self.into[0]:
                prefix, leaf = match[1] or "", match[3]
                parts = tuple(tensors[f"{prefix}{p}.{leaf}"] for p in self.into)
                joined = Join(parts) if self.groups == 1 else GroupJoin(parts, self.groups)
                out[f"{prefix}{self.hf}.{leaf}"] = joined
        return out


def _stack(tensors: Tensors, numbered: str, stacked: str) -> Tensors:
    """Every `PREFIX.numbered.LEAF`, with its `{}` counting from 0, becomes one `stacked`."""
    before, after = map(re.escape, numbered.split("{}"))
    pattern = re.compile(rf"^(.*?\.)??{before}(\d+){after}\.([^.]+)$")
    out: Tensors = {}
    runs: dict[str, dict[int, Expr]] = {}
    for name, expr in tensors.items():
        match = pattern.match(name)
        if match is None:
            out[name] = expr
        else:
            target = f"{match[1] or ''}{stacked}.{match[3]}"
            runs.setdefault(target, {})[int(match[2])] = expr
    for target, parts in runs.items():
        if sorted(parts) != list(range(len(parts))) or len({p.shape for p in parts.values()}) > 1:
            raise WeightPlanError(
                f"{target} is stored as parts {sorted(parts)} of shapes "
                f"{sorted({p.shape for p in parts.values()})}; they must count from 0 and be "
                f"alike. The checkpoint is incomplete."
            )
        out[target] = Stacked(tuple(parts[i] for i in range(len(parts))))
    return out


def _unstack(tensors: Tensors, stacked: str, numbered: str) -> Tensors:
    """The inverse of `_stack`."""
    pattern = re.compile(rf"^(.*\.)?{re.escape(stacked)}\.([^.]+)$")
    out: Tensors = {}
    for name, expr in tensors.items():
        match = pattern.match(name)
        if match is None:
            out[name] = expr
            continue
        for i in range(expr.shape[0]):
            out[f"{match[1] or ''}{numbered.format(i)}.{match[2]}"] = Item(expr, i)
    return out


@dataclass(frozen=True)
class Stack:
    """Stored tensors `hf` (a name with `{}` for the number) are one of ours along a new dimension.

    Acts on every `PREFIX.hf.LEAF`: `Stack("norms.{}", "q_norm")`.
    """

    hf: str
    ours: str

    def forward(self, tensors: Tensors) -> Tensors:
        return _stack(tensors, self.hf, self.ours)

    def inverse(self, tensors: Tensors) -> Tensors:
        return _unstack(tensors, self.ours, self.hf)


@dataclass(frozen=True)
class Unstack:
    """One stored tensor `hf` holds several of ours (a name with `{}`) along its first dimension."""

    hf: str
    ours: str

    def forward(self, tensors: Tensors) -> Tensors:
        return _unstack(tensors, self.hf, self.ours)

    def inverse(self, tensors: Tensors) -> Tensors:
        return _stack(tensors, self.ours, self.hf)


@dataclass(frozen=True)
class Transpose:
    """Matrices stored `[in, out]`: tensors whose name ends in `name`, a regular expression."""

    name: str

    def forward(self, tensors: Tensors) -> Tensors:
        pattern = re.compile(rf"(?:.*\.)?{self.name}")
        return {n: Transposed(e) if pattern.fullmatch(n) else e for n, e in tensors.items()}

    inverse = forward


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


@dataclass(frozen=True)
class Scaled:
    """`PREFIX.weight` stored in 8-bit floats, with a scale `PREFIX.suffix` for each of its blocks.

    Comes before rules that rename. Weights stored in a wider type have no scale and stay as they
    are. The inverse leaves weights in full: nothing is quantised on export.

    Args:
        block: rows and columns that share a scale.
    """

    suffix: str
    block: tuple[int, int]

    def forward(self, tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name, expr in tensors.items():
            stem, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue
            scale = out.pop(f"{stem}.{self.suffix}", None)
            if scale is not None:
                self._check(name, expr, scale)
                out[name] = Dequantised(expr, scale, self.block)
            elif expr.dtype.startswith("float8"):
                raise WeightPlanError(
                    f"{name} is stored in {expr.dtype}, but there is no {stem}.{self.suffix}. The "
                    f"checkpoint is incomplete."
                )
        return out

    def _check(self, name: str, expr: Expr, scale: Expr) -> None:
        wanted = tuple(-(-n // b) for n, b in zip(expr.shape, self.block, strict=False))
        if len(expr.shape) != len(self.block) or scale.shape != wanted:
            raise WeightPlanError(
                f"{name} is {list(expr.shape)} and its scales {list(scale.shape)}; blocks of "
                f"{list(self.block)} need {list(wanted)}. The checkpoint and its config.json "
                f"disagree."
            )

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
    names = None if names is None else tuple(names)
    for rule in reversed(rules):
        if isinstance(rule, Bare) and names is not None and rule.is_kept_by(names):
            continue
        tensors = rule.inverse(tensors)
        tied |= {rule.tensor} if isinstance(rule, Tie) else set()
    if names is None:
        return {name: expr for name, expr in tensors.items() if name not in tied}
    return {name: tensors[name] for name in names if name in tensors}
