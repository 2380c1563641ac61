"""What breaks while a run trains loses nothing that was saved before."""

import os
import resource
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from orbax.checkpoint import v1 as ocp

from experiments.machines import Preempted
from experiments.metrics import read_records
from experiments.train import DivergedError, train
from sparsejax.checkpoint import Checkpointer, CheckpointError


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A variant, and the folder of its undisturbed run."""
    variant, folder = small.variant("rigl", sparsity=0.5, hidden=(64,)), tmp_path_factory.mktemp("reference")
    train(variant, folder, 0, resume=False, progress=False)
    return variant, folder


def newest(folder: Path):
    """The newest step, and the records of its leaves, checksums included."""
    with Checkpointer(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step
        return step, ocp.metadata(checkpoints.directory / str(step)).custom_metadata["sparsejax"]


def disturb(monkeypatch, variant, step: int, before=lambda batch: batch, after=lambda state: state) -> None:
    """Changes the batch of one step, or the state after it."""
    run = variant.run_step

    def disturbed(state, batch, seed):
        here = int(state.step) == step
        state, out = run(state, before(batch) if here else batch, seed)
        return after(state) if here else state, out

    monkeypatch.setattr(variant, "run_step", disturbed)


def wait_for(folder: Path, seconds: float = 60) -> None:
    """Returns once a folder that is renamed into place when it is complete is there."""
    end = time.monotonic() + seconds
    while not folder.exists():
        assert time.monotonic() < end, f"{folder} was not written within {seconds:.0f} s"
        time.sleep(0.01)


def assert_resumes_to_the_same_end(reference, folder: Path) -> None:
    variant, undisturbed = reference
    train(variant, folder, 0, resume=True, progress=False)
    assert newest(folder) == newest(undisturbed)


@pytest.mark.parametrize("step", [30, 33], ids=["masks move", "masks stay"])
def test_gradients_that_are_not_numbers_stop_the_run(reference, monkeypatch, tmp_path, step):
    variant, _ = reference
    with monkeypatch.context() as patch:
        disturb(patch, variant, step, before=lambda batch: {**batch, "image": batch["image"] * np.nan})
        with pytest.raises(DivergedError, match=rf"the loss of step {step} is nan; the newest checkpoint, of step 20"):
            train(variant, tmp_path, 0, resume=False, progress=False)
    assert newest(tmp_path)[0] == 20
    assert_resumes_to_the_same_end(reference, tmp_path)


def test_weights_that_are_not_finite_are_not_saved(reference, monkeypatch, tmp_path):
    variant, _ = reference

    def break_one(state):
        params = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.inf), state.params)
        return state._replace(params=params)

    disturb(monkeypatch, variant, 39, after=break_one)
    with pytest.raises(DivergedError, match="after 40 steps layers/0/bias has entries that are not finite"):
        train(variant, tmp_path, 0, resume=False, progress=False)
    assert newest(tmp_path)[0] == 20


def untold(records):
    """The records but those of steps 34 and 40 that tell of the interval before them."""
    return [r for r in records if r["kind"] not in ("train", "masks") or r["step"] not in (34, 40)]


def test_notice_of_preemption_saves_at_once(reference, monkeypatch, tmp_path):
    variant, undisturbed = reference

    def notice(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        disturb(patch, variant, 33, before=notice)
        with pytest.raises(Preempted, match="saved step 34 of 70"):
            train(variant, tmp_path, 0, resume=False, progress=False)
    assert newest(tmp_path)[0] == 34
    assert_resumes_to_the_same_end(reference, tmp_path)
    records, expected = (small.without_seconds(read_records(f / "metrics.jsonl")) for f in (tmp_path, undisturbed))
    # One more pair of records, at the step of the notice; it and the next pair are the two parts of their interval.
    assert [(r["kind"], r["step"]) for r in records if r["step"] == 34] == [("train", 34), ("masks", 34)]
    loss, whole = ({r["step"]: r["loss"] for r in log if r["kind"] == "train"} for log in (records, expected))
    np.testing.assert_allclose((4 * loss[34] + 6 * loss[40]) / 10, whole[40], rtol=1e-6)
    assert untold(records) == untold(expected)


def test_a_full_disk_loses_nothing_saved_before(reference, monkeypatch, tmp_path):
    """Files may not grow past 8 KiB from step 38 on: the save at 40 fails in the background, and is reported."""
    variant, _ = reference
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(batch):
        wait_for(tmp_path / "checkpoints" / "20")  # it is written in the background, and must not meet the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        return batch

    with monkeypatch.context() as patch:
        disturb(patch, variant, 38, before=fill_disk)
        try:
            with pytest.raises(
                CheckpointError, match=r"40 could not be saved .*; steps saved before are as they were: 20"
            ):
                train(variant, tmp_path, 0, resume=False, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(tmp_path)[0] == 20
    assert_resumes_to_the_same_end(reference, tmp_path)
