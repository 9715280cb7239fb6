"""Bring rows into the order of their groups, as the grouped matrix product takes them."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch

_FEW = 2048  # rows that are compared with each other: a few microseconds, where a sort takes many


def group_rows(
    groups: jax.Array, num_groups: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Order rows by group; rows of one group stay in order, those of no group come last.

    groups: i32[M], the group of each row; num_groups and more: of none.
    implementation: "counted" or "sorted"; None lets the platform lowered for decide.

    Returns:
        order: i32[M], the row at each place.
        places: i32[M], the place of each row.
        sizes: i32[num_groups], rows of each group.
    """
    order, places = dispatch(
        "group_rows",
        (
            Implementation("counted", _counted, platforms=("cuda",)),
            Implementation("sorted", _sorted),
        ),
        groups,
        implementation=implementation,
    )
    sizes = (groups == jnp.arange(num_groups, dtype=groups.dtype)[:, None]).sum(1, dtype=jnp.int32)
    return order, places, sizes


def _counted(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The place of a row is the number of those before it. Raises NotImplementedError for many."""
    if groups.size > _FEW:
        raise NotImplementedError(f"{groups.size} rows are too many to compare with each other")
    rows = jnp.arange(groups.size, dtype=jnp.int32)
    others, own = groups[None], groups[:, None]
    before = (others < own) | ((others == own) & (rows[None] < rows[:, None]))
    places = before.sum(1, dtype=jnp.int32)
    order = jnp.where(places[None] == rows[:, None], rows[None], 0).sum(1, dtype=jnp.int32)
    return order, places


def _sorted(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    rows = jnp.arange(groups.size, dtype=jnp.int32)
    return order, jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
