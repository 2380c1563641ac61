"""Runs an experiment in several processes on this machine.

    python -m experiments.launch.local --processes 2 --devices 4 -- run bytes_lm --mesh 2 2 2 --output runs/two

When one process fails, the others are ended; with --restarts they then all start again, with --resume, unless what was
asked for cannot be run at all. What several processes say alike is shown once. SIGTERM is passed on to all, which save
and stop.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from experiments.__main__ import REFUSED, check

TOGETHER = 10.0  # seconds that the other processes have to end by themselves once one has failed


class Job:
    """Processes that run one command of `python -m experiments` together.

    Args:
        arguments: of the command.
        processes: how many.
        devices: CPU devices of each; None takes what is there.
        environment: variables that differ from this process's.
        output: called with the number of a process and a line that it prints.

    Attributes:
        workers: the processes, `subprocess.Popen`.
    """

    def __init__(self, arguments, *, processes: int, devices: int | None = None, environment=None, output=None):
        environment = {**os.environ, **(environment or {})}
        if devices is not None:
            flags = environment.get("XLA_FLAGS", "").split()
            flags = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
            flags.append(f"--xla_force_host_platform_device_count={devices}")
            environment |= {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        address = f"127.0.0.1:{_free_port()}"
        self._output = output or _showing()
        self.workers = []
        self._readers = []
        for index in range(processes):
            where = ["--coordinator", address, "--processes", str(processes), "--process", str(index)]
            worker = subprocess.Popen(
                [sys.executable, "-m", "experiments", *arguments, *where],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self.workers.append(worker)
            reader = threading.Thread(target=self._read, args=(index, worker), daemon=True)
            reader.start()
            self._readers.append(reader)

    def _read(self, index: int, worker) -> None:
        with worker.stdout:
            for line in worker.stdout:
                self._output(index, line.rstrip("\n"))

    def wait(self) -> int:
        """Waits for all; returns 0, or the status of the first that failed, after which the others are ended."""
        while True:
            states = [worker.poll() for worker in self.workers]
            failed = next((state for state in states if state), None)
            if failed is not None:
                how = f"was ended by {signal.Signals(-failed).name}" if failed < 0 else f"failed with status {failed}"
                if failed != REFUSED:
                    self._output(states.index(failed), f"this process {how}; the others end too, and --resume goes on")
                self._end()
                return failed
            if all(state == 0 for state in states):
                self._end()
                return 0
            time.sleep(0.05)

    def _end(self) -> None:
        deadline = time.monotonic() + TOGETHER
        for worker in self.workers:
            try:
                worker.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for reader in self._readers:
            reader.join(5)

    def send(self, number: int) -> None:
        """Sends a signal to all that still run."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)


def _showing():
    """Prints lines with the number of their process, without what another one has said already, and empty ones."""
    said = {}

    def show(index: int, line: str) -> None:
        if line.strip() and said.setdefault(line, index) == index:
            print(f"[{index}] {line}", flush=True)

    return show


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _at_least(smallest: int):
    """A type of an argument: a whole number that is not too small."""

    def parse(word: str) -> int:
        if not word.lstrip("-").isdigit() or int(word) < smallest:
            raise argparse.ArgumentTypeError(f"{word} is not a whole number of {smallest} or more")
        return int(word)

    return parse


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch.local",
        description=__doc__.splitlines()[0],
        usage="%(prog)s [options] -- run NAME ...",
    )
    parser.add_argument("--processes", type=_at_least(1), default=2, help="processes on this machine")
    parser.add_argument("--devices", type=_at_least(1), help="CPU devices of each process; by default what JAX finds")
    parser.add_argument(
        "--restarts", type=_at_least(0), default=0, help="how often to start again, with --resume, after a failure"
    )
    parser.add_argument("command", nargs="+", help="what follows `python -m experiments`")
    options = parser.parse_args(arguments)
    command = list(options.command)
    if status := check(command):
        return status
    stopped = threading.Event()
    for attempt in range(options.restarts + 1):
        job = Job(command, processes=options.processes, devices=options.devices)

        def stop(number, frame, job=job):
            stopped.set()
            job.send(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        status = job.wait()
        if status in (0, REFUSED) or stopped.is_set() or attempt == options.restarts:
            break
        print(f"a process ended with status {status}; all start again from the newest checkpoint", flush=True)
        command += ["--resume"] * ("--resume" not in command)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
