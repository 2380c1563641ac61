"""Faults of a run in two processes, from outside: nothing that was saved is lost, and it ends with the same bits."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from experiments.launch.local import Job
from experiments.machines import PREEMPTED
from experiments.processes import LATE
from sparsejax.checkpoint import Checkpointer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MESH = ("--mesh", "2", "2", "2")
RUN = {"algorithms": ("rigl",), "steps": 80, "save_every": 5, "log_every": 5, "eval_every": 20}


class Started:
    """A job of two processes, and what it prints."""

    def __init__(self, folder: Path, *more: str):
        words = ["run", "bytes_lm", *tiny.flags(**RUN, output=str(folder)), *MESH, "--resume", *more]
        environment = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": tiny.FAST_COMPILATION,
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.lines: list[str] = []
        self.checkpoints = folder / "rigl" / "seed0" / "checkpoints"
        self.job = Job(words, processes=2, devices=4, environment=environment, output=self._keep)

    def _keep(self, index: int, line: str) -> None:
        self.lines.append(f"[{index}] {line}")

    def stop(self) -> None:
        """Ends what still runs."""
        self.job.send(signal.SIGKILL)
        self.job.wait()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def saved(self) -> list[int]:
        return [int(name) for name in self._names() if name.isdigit()]

    def saving(self) -> bool:
        return any("orbax-checkpoint-tmp" in name for name in self._names())

    def _names(self) -> list[str]:
        return os.listdir(self.checkpoints) if self.checkpoints.exists() else []

    def until(self, condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert all(worker.poll() is None for worker in self.job.workers), self.text[-3000:]
            assert time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.002)

    def end(self) -> int:
        return self.job.wait()


def manifest(checkpoints: Path):
    with Checkpointer(checkpoints) as found:
        step = found.latest_step
        return step, ocp.metadata(found.directory / str(step)).custom_metadata["sparsejax"]


@pytest.fixture
def start(tmp_path):
    """Starts, or resumes, a run of a name in two processes, which do not outlive the test."""
    started = []

    def begin(name: str, *more: str) -> Started:
        started.append(Started(tmp_path / name, *more))
        return started[-1]

    yield begin
    for run in started:
        run.stop()


def test_a_run_survives_one_fault_after_the_other(start):
    """Killed, stopped, preempted, damaged, killed in the middle of a save: it ends with the bits of a quiet run."""
    quiet = start("quiet")
    assert quiet.end() == 0, quiet.text[-3000:]

    run = start("run")
    run.until(lambda: max(run.saved(), default=0) >= 10)
    run.job.workers[1].kill()
    assert run.end() != 0
    assert all(worker.poll() is not None for worker in run.job.workers)

    run = start("run", "--patience", "120")
    before = max(run.saved())
    run.until(lambda: max(run.saved()) >= before + 10)
    run.job.workers[1].send_signal(signal.SIGSTOP)
    run.job.workers[0].wait(120)
    assert run.job.workers[0].returncode == LATE, run.text[-3000:]
    run.job.workers[1].kill()
    run.end()
    late = re.search(r"error: process 0 has waited .* process 1 \((.*)\) stopped answering", run.text)
    assert late is not None, run.text[-3000:]
    assert late.group(1) == socket.gethostname()

    run = start("run")
    before = max(run.saved())
    run.until(lambda: max(run.saved()) >= before + 10)
    run.job.workers[1].send_signal(signal.SIGTERM)
    assert run.end() == PREEMPTED, run.text[-3000:]
    newest = max(run.saved())
    assert f"notice of preemption: saved step {newest} of {RUN['steps']}" in run.text

    for path in (run.checkpoints / str(newest)).rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])
    run = start("run")
    run.until(lambda: max(run.saved()) > newest and run.saving())
    run.job.send(signal.SIGKILL)
    assert run.end() != 0
    assert f"{newest} is damaged" in run.text

    run = start("run")
    assert run.end() == 0, run.text[-3000:]
    assert manifest(run.checkpoints) == manifest(quiet.checkpoints)


def test_the_launcher_starts_again_by_itself(tmp_path):
    words = tiny.flags(**RUN, output=str(tmp_path / "run"))
    launch = ["experiments.launch.local", "--devices", "4", "--restarts", "1", "--", "run", "bytes_lm"]
    process = subprocess.Popen(
        [sys.executable, "-m", *launch, *words, *MESH],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": tiny.FAST_COMPILATION},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoints = tmp_path / "run" / "rigl" / "seed0" / "checkpoints"
    deadline = time.monotonic() + 240
    while not any(checkpoints.glob("[1-5][05]")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "all start again from the newest checkpoint" in output
    assert manifest(checkpoints)[0] == RUN["steps"]
