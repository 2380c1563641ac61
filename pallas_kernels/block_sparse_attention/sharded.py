"""Attention on explicitly sharded arrays: each device computes its sequences and heads, and nothing is exchanged."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.block_sparse_attention.lists import BlockLists
from pallas_kernels.block_sparse_attention.options import Extras, Settings, seed_from
from pallas_kernels.mapping import axis_names, axis_size, explicit_spec, over_mesh, split_columns

Array = Any


class Split(NamedTuple):
    """Mesh axes, as entries of a PartitionSpec, along which a call is split.

    Attributes:
        batch: those of sequences.
        heads: those of heads.
        head_parts: into how many parts they split the heads.
    """

    batch: Any
    heads: Any
    head_parts: int


def split_of(q: Array, k: Array, v: Array, extras: Extras, settings: Settings) -> Split | None:
    """How a call is split, after q, where that is whole after k, then v; None where all are whole.

    Raises:
        ValueError: an axis is split that every device needs whole, or parts are not alike.
    """
    named = {"q": q, "k": k, "v": v}
    specs = {name: explicit_spec(x) for name, x in named.items()}
    if not any(entry for spec in specs.values() for entry in spec):
        return None
    for name, spec in specs.items():
        needed = {1: "length", 3: "features"}
        if settings.page_size is not None and name != "q":
            needed = {0: "pages", 1: "page", 3: "features"}
        for axis, what in needed.items():
            if spec[axis]:
                whole = PartitionSpec(*(None if i in needed else entry for i, entry in enumerate(spec)))
                raise ValueError(
                    f"{name} {named[name].shape} is split along axis {axis}, its {what}, over {_in_words(spec[axis])}; "
                    "attention is split along batch and heads alone, and every device needs the rest: "
                    f"jax.reshard({name}, {whole})"
                )
    batch = next((spec[0] for name, spec in specs.items() if spec[0]), None)
    owner = next((name for name, spec in specs.items() if spec[2]), "q")
    heads = split_columns((batch,), specs[owner][2])
    parts, kv_heads = axis_size(heads, named[owner]), k.shape[2]
    if kv_heads % parts:
        repeats = math.lcm(kv_heads, parts) // kv_heads
        raise ValueError(
            f"the heads of {owner} {named[owner].shape} are split over {_in_words(heads)} into {parts} parts, which do "
            f"not divide the {kv_heads} heads of k and v: repeat those, jnp.repeat(k, {repeats}, axis=2), and v alike, "
            f"or split the heads of {owner} over fewer devices"
        )
    if settings.dropout and parts > 1 and q.shape[0] > axis_size(batch, q):
        raise ValueError(
            f"dropout with the heads of {owner} {named[owner].shape} split over {_in_words(heads)}: a device can then "
            "take one sequence only, since dropout counts heads over all of them: split the batch over more devices, "
            "or not the heads"
        )
    return Split(batch, heads, parts)


def _in_words(entry: Any) -> str:
    names = axis_names(entry)
    return f"mesh ax{'e' if len(names) > 1 else 'i'}s {', '.join(map(repr, names))}"


def on_parts(run: Callable[..., Any], split: Split, q, k, v, lists: BlockLists, extras: Extras, sinks) -> Any:
    """Calls `run(q, k, v, lists, extras, sinks)` on the parts of each device.

    Args:
        run: returns o [B, Sq, H, Dv], lse [B, H, Sq], largest logits [B, H] or None, and [B, H, nq, W] or None.
        split: from `split_of`.
        q, k, v, lists, extras, sinks: global arrays; those of lists and extras are resharded where they lie otherwise.
    """
    batch, heads, _ = split
    sequences = PartitionSpec(None if extras.page_table is not None else batch, None, heads)
    specs = (
        PartitionSpec(batch, None, heads),
        sequences,
        sequences,
        _of_lists(lists, batch, heads),
        _of_extras(extras, lists, batch, heads),
        PartitionSpec(heads),
    )

    def local(q, k, v, lists, extras, sinks):
        if extras.seed is not None:
            first = jax.lax.axis_index(axis_names(batch)) * q.shape[0] * q.shape[2] * split.head_parts
            first += jax.lax.axis_index(axis_names(heads)) * q.shape[2]
            extras = extras._replace(seed=seed_from(extras.seed, first))
        return run(q, k, v, lists, extras, sinks)

    out = (PartitionSpec(batch, None, heads), *(PartitionSpec(batch, heads),) * 3)
    return over_mesh(local, (q, k, v, lists, extras, sinks), specs, out)


def _of_lists(lists: BlockLists, batch: Any, heads: Any) -> BlockLists:
    """The PartitionSpec of every leaf: axes of 1 are the same for all, and whole."""
    leading = _leading(lists.idx, batch, heads)

    def of_payload(name):
        if name == "bits":
            return leading
        if name.startswith(("q_", "kv_")):
            return _leading(lists.payload[name], batch)
        return PartitionSpec(*({"head": [heads], "batch": [batch]}.get(name.split("_")[0], [])))

    fields = {field.name for field in dataclasses.fields(lists)} - {"payload"}
    arrays = {name for name in fields if hasattr(getattr(lists, name), "shape")}
    payload = {name: of_payload(name) for name in lists.payload}
    return dataclasses.replace(lists, **dict.fromkeys(arrays, leading), payload=payload)


def _of_extras(extras: Extras, lists: BlockLists, batch: Any, heads: Any) -> Extras:
    specs = Extras(
        alibi=PartitionSpec(heads),
        bias=None if extras.bias is None else _leading(extras.bias, batch, heads),
        block_bias=_leading(lists.idx, batch, heads),
        seed=PartitionSpec(),
        kv_lengths=PartitionSpec(batch),
        page_table=PartitionSpec(batch),
    )
    return Extras(*(None if x is None else spec for x, spec in zip(extras, specs, strict=True)))


def _leading(x: Array, *entries: Any) -> PartitionSpec:
    return PartitionSpec(*(None if size == 1 else entry for size, entry in zip(x.shape, entries, strict=False)))
