"""Training with weights stored in blocks: the same as masks on blocks, also after an interruption."""

import itertools

import numpy as np
import pytest

from experiments.experiment import UsageError
from experiments.metrics import read_records
from experiments.train import train
from tests.experiments.small import variant, without_seconds


class Stop(Exception):
    """Stands for whatever ends a run early."""


@pytest.mark.slow
def test_stored_blocks_train_like_masked_ones(tmp_path):
    masked = train(variant("rigl", structure="block"), tmp_path / "masked", 0, resume=False, progress=False)
    stored = train(variant("rigl", storage="block"), tmp_path / "stored", 0, resume=False, progress=False)
    assert (masked["execution"], stored["execution"]) == ("simulated", "accelerated")
    assert stored["nnz"] == masked["nnz"]
    np.testing.assert_allclose(stored["loss"], masked["loss"], rtol=0.05)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path):
    whole, broken = (variant("rigl", storage="block") for _ in range(2))
    train(whole, tmp_path / "whole", 0, resume=False, progress=False)
    step, calls = broken.run_step, itertools.count()

    def stopping(*arguments):
        if next(calls) == 55:
            raise Stop
        return step(*arguments)

    broken.run_step = stopping
    with pytest.raises(Stop):
        train(broken, tmp_path / "broken", 0, resume=False, progress=False)
    broken.run_step = step
    train(broken, tmp_path / "broken", 0, resume=True, progress=False)
    records = [without_seconds(read_records(tmp_path / name / "metrics.jsonl")) for name in ("whole", "broken")]
    assert records[0] == records[1]


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(UsageError, match="--structure channel"):
        variant("rigl", storage="block", structure="channel")
    with pytest.raises(UsageError, match="snip finds masks"):
        variant("snip", storage="block")
    with pytest.raises(ValueError, match="dense weights under the mask"):
        variant("straight_through", storage="block")
