"""A run that is interrupted, anywhere, and resumed ends with the same bits as one that is not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
from orbax.checkpoint import v1 as ocp

from experiments.metrics import MetricsLog, read_records
from experiments.train import train
from sparsejax.checkpoint import Checkpointer, DamagedCheckpointError

ROOT = Path(__file__).parents[2]


def last_state(run: Path):
    """The newest checkpoint of a run: its leaves by name, and the checksum of the position in the data."""
    with Checkpointer(run / "checkpoints") as checkpoints:
        step = checkpoints.latest_step
        manifest = ocp.metadata(checkpoints.directory / str(step)).custom_metadata["sparsejax"]
        like = {name: np.zeros(leaf["shape"], leaf["dtype"]) for name, leaf in manifest["leaves"].items()}
        return step, manifest, checkpoints.restore(like)


def assert_same_end(folder: Path, reference: Path) -> None:
    """Compares states bit for bit, masks and positions in the data included, and metrics."""
    step, manifest, leaves = last_state(folder)
    assert (step, manifest) == last_state(reference)[:2]
    for name, expected in last_state(reference)[2].items():
        assert leaves[name].tobytes() == expected.tobytes(), name
    logs = [small.without_seconds(read_records(run / "metrics.jsonl")) for run in (folder, reference)]
    assert logs[0] == logs[1]


def empty_files(checkpoint: Path) -> None:
    """Truncates all files that hold values."""
    for path in checkpoint.rglob("d/*"):
        path.write_bytes(b"")


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, kind: str, step: int) -> None:
    """Makes the log fail when a record is about to be written."""
    write = MetricsLog.write

    def failing(self, found, at, **fields):
        if (found, at) == (kind, step):
            raise Interrupted
        return write(self, found, at, **fields)

    monkeypatch.setattr(MetricsLog, "write", failing)


@pytest.mark.parametrize(
    "name", ["rigl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("top_kast", "set", "dense", "snip"))]
)
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys, name):
    variant = small.variant(name)
    reference, folder = tmp_path / "reference", tmp_path / "run"
    final = train(variant, reference, 0, resume=False, progress=False)
    for kind, step in [("eval", 0), ("masks", 15), ("train", 30), ("eval", 40), ("train", 70)]:
        with monkeypatch.context() as patch:
            interrupt(patch, kind, step)
            with pytest.raises(Interrupted):
                train(variant, folder, 0, resume=True, progress=False)

    # The newest checkpoint rots while nothing runs: the one before it serves, and that is said.
    empty_files(folder / "checkpoints" / "60")
    with monkeypatch.context() as patch:
        interrupt(patch, "final", 70)
        with pytest.raises(Interrupted):
            train(variant, folder, 0, resume=True, progress=False)
    assert "60 is damaged" in capsys.readouterr().err

    resumed = train(variant, folder, 0, resume=True, progress=False)
    assert {**resumed, "seconds": 0} == {**final, "seconds": 0}
    assert_same_end(folder, reference)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """SIGKILL before the first checkpoint, in the middle of a save, and between saves."""
    fields = {
        "algorithms": "rigl",
        "seeds": 0,
        "hidden": 24,
        "sparsity": 0.9,
        "batch-size": 32,
        "steps": 250,
        "update-every": 15,
        "log-every": 5,
        "eval-every": 50,
        "save-every": 10,
    }
    command = ["-m", "experiments", "run", "digits_dst", "--resume"]
    command += [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(output: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *command, "--output", str(output)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )

    with start(tmp_path / "reference") as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()

    reference, folder = (tmp_path / name / "rigl" / "seed0" for name in ("reference", "killed"))
    checkpoints = folder / "checkpoints"

    def saved() -> list[int]:
        return [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.exists() else []

    def saving() -> bool:
        return any("orbax-checkpoint-tmp" in path.name for path in checkpoints.iterdir())

    def kill_when(condition) -> None:
        with start(tmp_path / "killed") as process:
            deadline = time.monotonic() + 120
            while not condition():
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)

    kill_when(lambda: (folder / "metrics.jsonl").exists())
    for _ in range(5):
        last = max(saved(), default=0)
        kill_when(lambda last=last: max(saved(), default=0) > last and saving())
        if saving():
            break
    else:
        pytest.fail("no save was interrupted in five attempts")
    last = max(saved())
    assert last < 200
    kill_when(lambda: max(saved()) >= last + 30 and not saving())
    with start(tmp_path / "killed") as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    assert_same_end(folder, reference)
    assert not saving()


def test_a_run_that_cannot_be_resumed_says_why(tmp_path):
    variant = small.variant("rigl")
    train(variant, tmp_path / "run", 0, resume=False, progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    empty_files(tmp_path / "run" / "checkpoints" / "70")
    with pytest.raises(DamagedCheckpointError, match="no other step verifies"):
        train(variant, tmp_path / "run", 0, resume=True, progress=False)
