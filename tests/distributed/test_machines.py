"""What is watched of a run on its machines."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import jax
import pytest

from experiments.chips import peak_flops
from experiments.experiment import UsageError
from experiments.machines import Machines, PreemptionNotice, Profile, Speed


def test_a_mesh_with_two_open_sides_is_refused():
    with pytest.raises(UsageError, match=r"mesh is \(-1, -1, 1\); .* one of them may be -1"):
        Machines(mesh=(-1, -1, 1)).layout()


def test_speed_leaves_out_the_steps_that_compile():
    speed = Speed(examples=8)
    with speed.over(5):
        time.sleep(0.2)
    assert speed.record(100, 300, 5, None) == {}
    with speed.over(10):
        time.sleep(0.1)
    found = speed.record(100, 300, 15, peak=1e6)
    assert 20 < found["steps_per_second"] <= 100
    for name, factor in [
        ("examples_per_second", 8),
        ("dense_flops_per_second", 100),
        ("sparse_flops_per_second", 20),
        ("mfu_dense", 100 / 1e6),
        ("mfu_sparse", 20 / 1e6),
    ]:
        assert found[name] == pytest.approx(factor * found["steps_per_second"], rel=2e-3), name


@pytest.mark.parametrize(("total", "profiled"), [(40, [10, 11, 12]), (12, [9, 10, 11]), (2, [1]), (1, [0]), (0, [])])
def test_short_runs_are_profiled_too(tmp_path, monkeypatch, total, profiled):
    running, seen = [], []

    @contextlib.contextmanager
    def trace(folder):
        running.append(folder)
        yield
        running.clear()

    monkeypatch.setattr(jax.profiler, "trace", trace)
    with Profile(str(tmp_path), total) as profile:
        for step in range(total):
            profile.step(())
            seen += [step] * len(running)
    assert (seen, running) == (profiled, [])


def test_the_peak_is_known_of_known_chips_only():
    v5p, other = SimpleNamespace(device_kind="TPU v5"), SimpleNamespace(device_kind="cpu")
    assert peak_flops([v5p, v5p]) == 2 * 459e12
    assert peak_flops([v5p, other]) is None


def test_notice_is_taken_while_training_only():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as noticed:
        assert not noticed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noticed(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_device_needs_no_mesh():
    assert Machines().layout() is None
    assert Machines().first
    assert Machines((1, 1, 1), "explicit").layout().explicit
