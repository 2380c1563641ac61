"""Programs that take turns being timed, ours and those of other libraries in a process of their own."""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

SLOW = 0.25
"""Seconds from which on one call is enough."""


class Peer:
    """A process of other libraries that obeys `peer.serve`; without one it knows no functions.

    Args:
        python: its interpreter, or "none".
        script: what it runs, beside this file.
    """

    def __init__(self, python: str, script: str):
        self.process = None
        if python == "none":
            return
        command = [python, str(Path(__file__).with_name(script)), "--threads", str(os.cpu_count())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read("ready")

    def read(self, word: str) -> str:
        """The rest of the next line that begins with `word`."""
        while line := self.process.stdout.readline():
            if line.startswith(word + " "):
                return line[len(word) + 1 :].strip()
        raise SystemExit("the peer process ended; are its libraries there? Name another interpreter with --peer")

    def say(self, line: str) -> None:
        """Sends a command."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def load(self, **problem) -> list[str]:
        """Hands over arrays; the names of what can be timed with them."""
        if self.process is None:
            return []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "problem.npz"
            np.savez(path, **problem)
            self.say(f"load {path}")
            return self.read("loaded").split(",")

    def seconds(self, name: str) -> float:
        """Times one function."""
        self.say(f"time {name}")
        return float(self.read("seconds"))

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def seconds(function) -> float:
    """Seconds of a compiled function: the least of a few calls, or of one that is long."""
    timings = []
    begin = time.perf_counter()
    while len(timings) < 2 or (len(timings) < 6 and time.perf_counter() - begin < 0.1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        timings.append(time.perf_counter() - start)
        if timings[0] > SLOW:
            break
    return min(timings)


def take_turns(functions: dict, rounds: int, first: dict[str, float] | None = None) -> dict[str, list[float]]:
    """Seconds of every function, round by round; what is slow is timed in the first round only.

    Args:
        functions: each returns its seconds.
        rounds: how many.
        first: timings of the first round that are there already.
    """
    timings = {name: [(first or {}).get(name) or timed()] for name, timed in functions.items()}
    for _ in range(rounds - 1):
        for name, timed in functions.items():
            timings[name].append(timings[name][0] if timings[name][0] > SLOW else timed())
    return timings


def ratio(timings: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is, the median over rounds."""
    return statistics.median(a / b for a, b in zip(timings[slow], timings[fast], strict=True))


def compiled(function, *arguments):
    """A function of no arguments, compiled already, so that its first call can be timed."""
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: seconds(lambda: program(*arguments))


def with_gradients(function, dy):
    """y and the gradients of the first two arguments."""

    def both(x, w, *rest):
        y, pull = jax.vjp(lambda x, w: function(x, w, *rest), x, w)
        return y, *pull(dy)

    return both
