"""What a compiled step must move and compute, counted, for a TPU slice that need not be there.

Matrix products and collectives are read from the compiled step; weights and KV pages follow from
its arguments and from the batch. Everything is per device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.checkpoint import read_config
from jaxserve.engine.kv_cache import bytes_per_device, cache_structs
from jaxserve.engine.loader import build_model, params_bytes_per_device
from jaxserve.engine.runner import Runner
from jaxserve.scheduler.buckets import Bucket
from model_defs.decoder import placements
from model_defs.registry import family_of
from model_defs.sharding import ShardingRules, make_mesh
from pallas_kernels import tpu_aot
from pallas_kernels.ragged_paged_attention import default_page_size

__all__ = ["Counts", "batch_rows", "compile_step", "count", "read_config", "topology_runner"]

Rows = Sequence[tuple[int, int]]  # new tokens and KV tokens of each row


@dataclass(frozen=True)
class Counts:
    """Of one step on one device.

    held_bytes: arguments and temporaries. weight_bytes, kv_bytes: read from memory.
    collective_bytes: results of `num_collectives` operations.
    """

    held_bytes: int
    weight_bytes: int
    kv_bytes: int
    matmul_flops: int
    attention_flops: int
    num_collectives: int
    collective_bytes: int

    def memory_s(self, chip: tpu_aot.Chip) -> float:
        return (self.weight_bytes + self.kv_bytes) / chip.hbm_bytes_per_s

    def compute_s(self, chip: tpu_aot.Chip) -> float:
        return (self.matmul_flops + self.attention_flops) / chip.bf16_flops_per_s

    def ideal_s(self, chip: tpu_aot.Chip) -> float:
        """No step is faster; one that overlaps all it does is as fast."""
        return max(self.memory_s(chip), self.compute_s(chip))


def topology_runner(
    config: Mapping[str, Any],
    devices: Sequence[jax.Device],
    tp_size: int,
    *,
    max_rows: int,
    max_model_len: int,
) -> Runner:
    """A runner in bfloat16 that can lower steps for `devices`, and dispatch none."""
    rules = ShardingRules(make_mesh(1, tp_size, devices))
    dtype = np.dtype(jnp.bfloat16)
    model = build_model(family_of(config).spec(config), rules, dtype, dtype)
    return Runner(
        model,
        page_size=default_page_size(devices[0].platform),
        max_rows=max_rows,
        max_model_len=max_model_len,
    )


def compile_step(runner: Runner, bucket: Bucket, num_pages: int) -> jax.stages.Compiled:
    """Compile one bucket's step for the runner's devices; nothing is loaded onto them."""
    return runner.lower(bucket, num_pages).compile()


def batch_rows(bucket: Bucket, context: int) -> list[tuple[int, int]]:
    """A batch that fills a bucket: decode rows at `context`, and the start of one prompt.

    A bucket with as many tokens as rows has decode rows alone.
    """
    chunk = bucket.tokens - bucket.rows
    decode = [(1, context)] * (bucket.rows - bool(chunk))
    return [*decode, (chunk + 1, chunk + 1)] if chunk else decode


def count(runner: Runner, compiled: jax.stages.Compiled, bucket: Bucket, rows: Rows) -> Counts:
    """Count a step that computes `rows`."""
    model, text = runner.model, compiled.as_text()
    shards = model.rules.shards("q_heads")
    kv_bytes, attention_flops = 0, 0
    for layer, spec in zip(model.spec.layers, model.module.cache_specs, strict=True):
        (page,) = cache_structs([spec], model.rules, 1, runner.page_size)
        token_bytes = bytes_per_device([page]) // runner.page_size
        window = spec.window or max(kv for _, kv in rows)
        kv_bytes += token_bytes * sum(min(kv, window + new - 1) for new, kv in rows)
        seen = sum(int(np.minimum(np.arange(kv - new, kv) + 1, window).sum()) for new, kv in rows)
        per_key = 2 * (spec.head_dim + spec.v_head_dim)
        attention_flops += -(-layer.mixer.heads // shards) * per_key * seen
    found = tpu_aot.collectives(text)
    memory = compiled.memory_analysis()
    return Counts(
        held_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        weight_bytes=params_bytes_per_device(model) - _unread_bytes(runner, bucket),
        kv_bytes=kv_bytes,
        matmul_flops=tpu_aot.matmul_flops(text),
        attention_flops=attention_flops,
        num_collectives=len(found),
        collective_bytes=sum(each.num_bytes for each in found),
    )


def _unread_bytes(runner: Runner, bucket: Bucket) -> int:
    """Bytes of the embedding table that a step does not look up, where it is no head as well."""
    model = runner.model
    names = [name[0] for name in placements(model.module)]
    if "head" not in names:
        return 0
    unread = 0
    for name, param in zip(names, model.params, strict=True):
        if name == "embed":
            entries, *rest = param.sharding.shard_shape(param.shape)
            row_bytes = int(np.prod(rest)) * param.dtype.itemsize
            unread += max(0, entries - bucket.tokens) * row_bytes
    return unread
