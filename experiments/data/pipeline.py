"""Grain datasets over any source: endless shuffled batches to train on, one pass in order to evaluate.

A batch is a pure function of (seed, step), so the state of an iterator is one number. It is saved and restored with
the model, as an item of an Orbax checkpoint, and the restored iterator continues with exactly the next batch.

Shuffle, repeat and batch are one step here, over arrays of indices. Grain's own take one record at a time: 6 ms for a
batch of 128 digits, several training steps of a small network, where this takes 0.04 ms.
"""

import functools
import sys
from collections.abc import Callable

import grain
import jax
import numpy as np

from experiments.data.sources import Source, stack_records

Batch = dict[str, np.ndarray]
# What is drawn from a seed. A stream each, so that no draw follows from another.
_ORDER, _REPLACEMENT, _AUGMENT = range(3)


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    replacement: bool = False,
    augment: Callable[[Batch, np.ndarray], Batch] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    threads: int = 0,
) -> grain.IterDataset:
    """Endless batches in an order that depends on the seed alone.

    Every epoch is a new permutation of the source, and a batch may span two. With several processes, each gets its
    consecutive rows of one global batch, so that the rows of all processes, in order, are what a single process gets.

    Args:
        source: records; `{name: array}` each, see `experiments.data.sources`.
        batch_size: rows of the global batch; `process_count` must divide it.
        seed: 0 to 2**32 - 1; the order, the draws and the augmentation follow from it.
        replacement: draw every row from the whole source, rather than go through it in epochs. For sources with many
            overlapping records, such as `ByteWindows` of stride 1, whose permutation would take memory for nothing.
        augment: `f(batch, bits) -> batch`, where `bits` is uint64 (rows,), a random word for every row that depends
            on the seed and the place in the order; see `experiments.data.augment`.
        process_index: which rows to give, by default `jax.process_index()`; ask after `jax.distributed.initialize`.
        process_count: over how many processes a batch is spread, by default `jax.process_count()`.
        threads: how many batches to read at the same time, ahead of use. 0 reads in the caller's thread, the fastest
            for what is in memory; files on disk want a few. The batches and their order do not depend on it.

    Returns:
        A `grain.IterDataset`. `iter(...)` of it has `get_state`, `set_state`, and what Orbax needs to save it.

    Raises:
        ValueError: an empty source, a `batch_size` that is not positive or not divisible, or a seed out of range.

    Example:
        >>> from experiments.data.digits import load_digits
        >>> batches = iter(training_batches(load_digits().train, batch_size=4, seed=0))
        >>> batch = next(batches)
        >>> batch["image"].shape, batch["label"].dtype, batches.get_state()
        ((4, 8, 8, 1), dtype('int32'), {'next_index': 1})
    """
    size, rows, first_row = _layout(source, batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, expected 0 to 2**32 - 1")
    mine = slice(first_row, first_row + rows)

    def read(step: int) -> Batch:
        if replacement:
            indices = (_words(seed, _REPLACEMENT, step, batch_size)[mine] % np.uint64(size)).astype(np.int64)
        else:
            indices = _shuffled(np.arange(rows) + step * batch_size + first_row, seed, size)
        batch = _take(source, indices)
        return batch if augment is None else augment(batch, _words(seed, _AUGMENT, step, batch_size)[mine])

    return grain.MapDataset.range(sys.maxsize // batch_size).map(read).to_iter_dataset(_read_options(threads))


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
    threads: int = 0,
) -> grain.IterDataset:
    """Every record once, in order, in batches of one shape.

    The last batch is filled up with copies of the last record. A field `weight`, float32 (rows,), is 1 for records and
    0 for these copies: sums weighted by it, divided by its sum over all batches and processes, are exact means.

    Args:
        source: records, as for `training_batches`.
        batch_size: rows of the global batch; `process_count` must divide it.
        process_index: which rows to give, by default `jax.process_index()`; ask after `jax.distributed.initialize`.
        process_count: over how many processes a batch is spread, by default `jax.process_count()`.
        threads: how many batches to read at the same time, as for `training_batches`.

    Returns:
        A finite `grain.IterDataset`; every process gets equally many batches.

    Raises:
        ValueError: an empty source, or a `batch_size` that is not positive or not divisible.

    Example:
        >>> from experiments.data.digits import load_digits
        >>> weights = [batch["weight"].sum() for batch in evaluation_batches(load_digits().heldout, batch_size=256)]
        >>> [int(weight) for weight in weights]
        [256, 256, 85]
    """
    size, rows, first_row = _layout(source, batch_size, process_index, process_count)

    def read(step: int) -> Batch:
        positions = np.arange(rows) + step * batch_size + first_row
        batch = _take(source, np.minimum(positions, size - 1))
        return {**batch, "weight": (positions < size).astype(np.float32)}

    return grain.MapDataset.range(-(-size // batch_size)).map(read).to_iter_dataset(_read_options(threads))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of `size` records that an epoch follows, int64 (size,).

    Sorting raw Philox words, rather than `Generator.permutation`, because NumPy promises the former never to change: a
    run resumed under another NumPy sees the same order.
    """
    order = np.argsort(_words(seed, _ORDER, epoch, size), kind="stable")
    order.flags.writeable = False  # shared by all who ask again
    return order


def _shuffled(positions: np.ndarray, seed: int, size: int) -> np.ndarray:
    epochs, places = np.divmod(positions, size)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), size)[places[here]]
    return indices


def _words(seed: int, stream: int, number: int, count: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence((seed, stream, number))).random_raw(count)


def _take(source: Source, indices: np.ndarray) -> Batch:
    if hasattr(source, "take"):
        return source.take(indices)
    return stack_records([source[int(index)] for index in indices], type(source).__name__)


def _read_options(threads: int) -> grain.ReadOptions:
    # The buffer counts whole batches here, so grain's default of 500 would fill the memory.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _layout(source: Source, batch_size: int, index: int | None, count: int | None) -> tuple[int, int, int]:
    """Checks the sizes; returns records of the source, rows of this process and its first row in the global batch."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if len(source) == 0:
        raise ValueError(f"{type(source).__name__} has no records, expected at least one")
    if not 0 <= index < count:
        raise ValueError(f"process_index is {index}, expected 0 to process_count - 1 = {count - 1}")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a positive multiple of process_count = {count}: "
            "it counts the rows of all processes together"
        )
    rows = batch_size // count
    return len(source), rows, index * rows
