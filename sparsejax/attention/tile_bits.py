"""Looking inside of tiles: exact kinds, and bits for rules that kernels cannot evaluate."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.rules import pack_bits
from sparsejax.attention.block_mask import BlockMask
from sparsejax.attention.rules import names_in


def pick(name: str, array, b: int, h: int):
    """The value of an array for one example and head; tables keep two axes."""
    if name.startswith("table_"):
        return array[b % array.shape[0], h % array.shape[1]]
    return array[{"head": h % max(1, array.size), "batch": b % max(1, array.size)}.get(name.split("_")[0], ...)]


def reads_tables(rule) -> bool:
    """Whether the rule of a mask looks at data, not at positions alone."""
    return any(name.startswith("table_") for name in names_in(rule))


@dataclasses.dataclass(frozen=True)
class Elements:
    """The arrays of one example and head, for looking inside of tiles."""

    values: Mapping[str, np.ndarray]
    b: int
    h: int
    sides: Mapping[str, int]

    def __call__(self, rule, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [n, bq, bk]: the rule at tiles, and which of their elements lie inside of the sequence."""
        bq, bk = self.sides["bq"], self.sides["bk"]
        i, j = row[:, None] * bq + np.arange(bq), column[:, None] * bk + np.arange(bk)
        inside = (i < self.sides["q_len"])[:, :, None] & (j < self.sides["kv_len"])[:, None, :]
        at = {}
        for name, array in self.values.items():
            if name.startswith("q_"):
                at[name] = array[self.b % array.shape[0]][np.minimum(i, self.sides["q_len"] - 1)][:, :, None]
            elif name.startswith("kv_"):
                at[name] = array[self.b % array.shape[0]][np.minimum(j, self.sides["kv_len"] - 1)][:, None, :]
            else:
                at[name] = pick(name, array, self.b, self.h)
        kept = rule(at.get("q_pos", i[:, :, None]), at.get("kv_pos", j[:, None, :]), at)
        return np.broadcast_to(np.asarray(kept), inside.shape), inside


def refine_tiles(rule, partial: np.ndarray, elements: Elements, nk: int) -> tuple[np.ndarray, np.ndarray]:
    """The partial tiles that stay partial, and those that turn out full."""
    stay, promoted = [partial[:0]], [partial[:0]]
    step = max(1, (1 << 20) // (elements.sides["bq"] * elements.sides["bk"]))
    for first in range(0, len(partial), step):
        tiles = partial[first : first + step]
        kept, inside = elements(rule, tiles // nk, tiles % nk)
        full, empty = (kept | ~inside).all((1, 2)), ~(kept & inside).any((1, 2))
        stay.append(tiles[~full & ~empty])
        promoted.append(tiles[full])
    return np.concatenate(stay), np.concatenate(promoted)


def host_bits(compiled: BlockMask, rule, values) -> BlockMask:
    """Stores the rule of every partial tile as bits, for rules that kernels cannot evaluate."""
    lists = compiled.lists
    sides = {"bq": lists.bq, "bk": lists.bk, "q_len": lists.q_len, "kv_len": lists.kv_len}
    batch, heads, nq, _ = lists.idx.shape
    bits = np.zeros((batch, heads, nq, max(1, lists.max_part), lists.bq, -(-lists.bk // 8)), np.uint8)
    for b, h, row in np.ndindex(batch, heads, nq):
        count = int(lists.n_part[b, h, row])
        if count:
            column = lists.idx[b, h, row, :count].astype(np.int64)
            kept, _ = Elements(values, b, h, sides)(rule, np.full(count, row, np.int64), column)
            bits[b, h, row, :count] = np.packbits(kept, axis=-1, bitorder="little")
    return _replace_rule(compiled, bits)


def add_bits(compiled: BlockMask, rule, in_kernel, values) -> BlockMask:
    """The same inside of a traced program, where every listed tile may be partial; only if `in_kernel` has tables."""
    if in_kernel is None or not reads_tables(in_kernel):
        return compiled
    lists = compiled.lists
    batch, heads, nq, width = lists.idx.shape
    i = jnp.minimum(jnp.arange(nq * lists.bq), lists.q_len - 1).reshape(nq, 1, lists.bq, 1)
    j = jnp.minimum(lists.idx[..., None] * lists.bk + jnp.arange(lists.bk), lists.kv_len - 1)[..., None, :]
    at = {}
    for name, array in values.items():
        side = name.split("_")[0]
        array = jnp.asarray(array)
        if side == "q":
            at[name] = array[:, None][:, :, i]
        elif side == "kv":
            at[name] = array[jnp.arange(array.shape[0]).reshape(-1, *[1] * 5), j]
        else:
            shape = {"head": (1, -1, 1, 1, 1, 1), "batch": (-1, 1, 1, 1, 1, 1)}.get(side)
            at[name] = array if shape is None else array.reshape(shape)
    kept = rule(at["q_pos"], at["kv_pos"], at)
    return _replace_rule(compiled, pack_bits(jnp.broadcast_to(kept, (batch, heads, nq, width, lists.bq, lists.bk))))


def _replace_rule(compiled: BlockMask, bits) -> BlockMask:
    payload = {**compiled.lists.payload, "bits": bits}
    return dataclasses.replace(compiled, lists=dataclasses.replace(compiled.lists, elem=None, payload=payload))
