import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from experiments.data.byte_corpus import ByteWindows
from experiments.data.digits import load_digits
from experiments.data.pipeline import epoch_order, evaluation_batches, training_batches


class Numbers:
    """A source without `take`: record i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"number": np.int32(index)}


def numbers(dataset, steps):
    batches = iter(dataset)
    return [next(batches)["number"].tolist() for _ in range(steps)]


def joined(parts):
    return [[number for rows in step for number in rows] for step in zip(*parts, strict=True)]


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_each_epoch_has_every_record_once(size, batch_size, seed):
    steps = -(-3 * size // batch_size)
    stream = np.concatenate(numbers(training_batches(Numbers(size), batch_size=batch_size, seed=seed), steps))
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_uniform():
    # Every record comes first equally often: 6000 draws over 6 places, chi-square with 5 degrees of freedom.
    firsts = np.bincount([epoch_order(0, epoch, 6)[0] for epoch in range(6000)], minlength=6)
    assert ((firsts - 1000) ** 2 / 1000).sum() < 20.5


def test_order_is_pinned():
    # These come from Philox words, which NumPy keeps for good; another value here breaks the resuming of old runs.
    assert epoch_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert numbers(training_batches(Numbers(100), batch_size=4, seed=7, replacement=True), 1) == [[98, 33, 4, 22]]


def test_replacement_draws_from_the_whole_source():
    stream = np.concatenate(numbers(training_batches(Numbers(5), batch_size=100, seed=0, replacement=True), 10))
    counts = np.bincount(stream, minlength=5)
    assert ((counts - 200) ** 2 / 200).sum() < 18.5
    windows = ByteWindows(np.arange(100, dtype=np.uint8), 8)
    batch = next(iter(training_batches(windows, batch_size=16, seed=0, replacement=True)))
    np.testing.assert_array_equal(batch["tokens"] - batch["tokens"][:, :1], np.tile(np.arange(9), (16, 1)))


@pytest.mark.parametrize("replacement", [False, True])
def test_processes_share_one_global_batch(replacement):
    options = {"batch_size": 12, "seed": 4, "replacement": replacement}
    whole = numbers(training_batches(Numbers(31), **options), 9)
    parts = [
        numbers(training_batches(Numbers(31), process_index=index, process_count=3, **options), 9) for index in range(3)
    ]
    assert whole == joined(parts)


def test_augmentation_does_not_depend_on_the_processes():
    def mark(batch, bits):
        return {"number": batch["number"] + (bits % np.uint64(1000)).astype(np.int64) * 100}

    options = {"batch_size": 8, "seed": 1, "augment": mark}
    whole = numbers(training_batches(Numbers(31), **options), 5)
    parts = [
        numbers(training_batches(Numbers(31), process_index=index, process_count=2, **options), 5) for index in (0, 1)
    ]
    assert whole == joined(parts)
    assert len({value // 100 for batch in whole for value in batch}) > 30


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(threads):
    options = {"batch_size": 7, "seed": 2}
    assert numbers(training_batches(Numbers(23), threads=threads, **options), 30) == numbers(
        training_batches(Numbers(23), **options), 30
    )


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_orbax_resumes_exactly(tmp_path, stop, threads):
    def batches():
        return iter(training_batches(load_digits().train, batch_size=128, seed=5, threads=threads))

    uninterrupted = batches()
    for _ in range(stop):
        next(uninterrupted)
    weights = jax.numpy.arange(4.0)
    ocp.save_checkpointables(tmp_path / "step", {"state": {"weights": weights}, "data": uninterrupted})
    expected = [next(uninterrupted) for _ in range(12)]

    resumed = batches()
    next(resumed)  # whatever the iterator did before, what is loaded counts
    abstract = {"weights": jax.ShapeDtypeStruct((4,), weights.dtype, sharding=weights.sharding)}
    loaded = ocp.load_checkpointables(tmp_path / "step", {"state": abstract, "data": resumed})
    np.testing.assert_array_equal(loaded["state"]["weights"], weights)
    for batch in expected:
        again = next(resumed)
        assert batch.keys() == again.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])


def test_state_is_the_step_and_can_be_set_back():
    batches = iter(training_batches(Numbers(10), batch_size=3, seed=0))
    state = batches.get_state()
    first = [next(batches)["number"].tolist() for _ in range(5)]
    assert batches.get_state() == {"next_index": 5}
    batches.set_state(state)
    assert [next(batches)["number"].tolist() for _ in range(5)] == first


def test_changing_a_batch_does_not_change_a_later_epoch():
    train = load_digits().train
    before = train.images.copy()
    batches = iter(training_batches(train, batch_size=100, seed=0))
    next(batches)["image"][:] = 9
    np.testing.assert_array_equal(train.images, before)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_gives_every_record_once_in_batches_of_one_shape(count):
    seen = []
    for index in range(count):
        batches = list(evaluation_batches(Numbers(21), batch_size=8, process_index=index, process_count=count))
        assert len(batches) == 3
        for batch in batches:
            assert batch["number"].shape == batch["weight"].shape == (8 // count,)
            assert batch["weight"].dtype == np.float32
            seen += batch["number"][batch["weight"] == 1].tolist()
    assert sorted(seen) == list(range(21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected a positive multiple of process_count = 1"),
        ({"batch_size": 6, "process_index": 0, "process_count": 4}, "batch_size is 6, .* process_count = 4"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2, expected 0 to process_count - 1 = 1"),
        ({"seed": -1}, r"seed is -1, expected 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"source": Numbers(0)}, "Numbers has no records"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    options = {"source": Numbers(10), "batch_size": 2, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        training_batches(options.pop("source"), **options)
