"""On what a run runs: devices, processes, and what is watched. None of it changes what is computed."""

import contextlib
import dataclasses
import signal
import threading
import time
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import multihost_utils

from experiments import processes
from experiments.experiment import UsageError
from experiments.sharding import Layout, make_mesh

PREEMPTED = 75  # exit status of a run that has saved and stopped: of sysexits.h, "try again"


@dataclasses.dataclass(frozen=True)
class Machines:
    """The devices and processes of a run."""

    # devices along data, fsdp and tensor; one of them may be -1 for all that are left
    mesh: tuple[int, int, int] = (1, 1, 1)
    # whether the compiler finds shardings by itself, or they are part of the types of arrays
    axis_types: Literal["auto", "explicit"] = "auto"
    # host:port of the first process, or auto on Cloud TPU, GKE and Slurm; without it there is one process
    coordinator: str = ""
    # how many processes train together; not for --coordinator auto
    processes: int = 0
    # which of them this one is, from 0; not for --coordinator auto
    process: int = 0
    # seconds that a process waits for others before it says who is late, and ends
    patience: float = 600.0
    # steps between two comparisons of all copies of the network; 0 compares at the start and at the end only
    compare_every: int = 1000
    # folder for a profile of three steps, from the eleventh on where there are so many, for TensorBoard or xprof
    profile: str = ""

    @property
    def first(self) -> bool:
        """Whether this process writes metrics and reports."""
        return not self.coordinator or jax.process_index() == 0

    def start(self) -> None:
        """Joins the other processes; before anything else is done with JAX.

        Raises:
            UsageError: the processes do not fit each other.
        """
        if self.coordinator:
            processes.start(self.coordinator, self.processes, self.process)
        elif self.processes or self.process:
            raise UsageError(
                f"processes is {self.processes} and process {self.process}, but without --coordinator there is one: "
                "give --coordinator host:port, or start all with python -m experiments.launch.local"
            )

    def layout(self) -> Layout | None:
        """Where arrays lie; None where one device has them all."""
        if not self.coordinator and tuple(self.mesh) == (1, 1, 1) and self.axis_types == "auto":
            return None
        return Layout(make_mesh(self.mesh, self.axis_types))


class Preempted(Exception):
    """The machine is about to be taken away; the run has saved its state and stopped."""


class PreemptionNotice:
    """Whether this machine, or any other of the job, is about to be taken away.

    Notice is SIGTERM, as Cloud TPU and GKE send it. With several processes JAX's preemption service chooses a step that
    none of them has reached yet, so that all save the same one.
    """

    def __enter__(self):
        self._noticed = False
        self._old = None
        self._together = jax.process_count() > 1
        if not self._together and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _notice(self, *_):
        self._noticed = True

    def __call__(self, step: int) -> bool:
        """Whether to save after this step and stop; to be asked after every step, by all processes."""
        return multihost_utils.reached_preemption_sync_point(step) if self._together else self._noticed


class Profile:
    """Writes a profile of three steps: the eleventh to the thirteenth of this process, or the last ones of fewer.

    Args:
        folder: where to; empty for none.
        total: steps that this process will take; the first compiles, and is left out where there are others.
    """

    def __init__(self, folder: str, total: int):
        self._folder, self._step = folder, 0
        self._begin = max(min(10, total - 3), min(1, total - 1))
        self._end = min(self._begin + 3, total)
        self._running = contextlib.ExitStack()

    def step(self, state) -> None:
        """To be called before every step, with arrays that the steps before compute."""
        if self._folder and self._step in (self._begin, self._end):
            jax.block_until_ready(state)
            if self._step == self._begin:
                self._running.enter_context(jax.profiler.trace(Path(self._folder).absolute()))
            else:
                self._running.close()
        self._step += 1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._running.close()


class Speed:
    """Steps a second, without what happens between steps such as evaluation and compilation.

    Args:
        examples: examples of a step.
    """

    def __init__(self, examples: int):
        self._examples, self._steps, self._seconds, self._compiled = examples, 0, 0.0, False

    @contextlib.contextmanager
    def over(self, steps: int):
        """Times some steps; the first ones are left out, since they compile."""
        began = time.perf_counter()
        yield
        if self._compiled:
            self._steps, self._seconds = self._steps + steps, self._seconds + time.perf_counter() - began
        self._compiled = True

    def record(self, dense_flops: int, flops: int, trained: int, peak: float | None) -> dict:
        """Throughput and use of the devices.

        Args:
            dense_flops: FLOPs of a step of the dense network.
            flops: FLOPs that the sparse network needs for `trained` steps.
            trained: steps that `flops` are of.
            peak: FLOPs a second that all devices together could do; None where not known.
        """
        if not self._steps:
            return {}
        rate = self._steps / self._seconds
        speed = {
            "steps_per_second": rate,
            "examples_per_second": rate * self._examples,
            "dense_flops_per_second": rate * dense_flops,
            "sparse_flops_per_second": rate * flops / max(trained, 1),
        }
        if peak:
            speed["mfu_dense"] = speed["dense_flops_per_second"] / peak
            speed["mfu_sparse"] = speed["sparse_flops_per_second"] / peak
        return {name: float(f"{value:.4g}") for name, value in speed.items()}
