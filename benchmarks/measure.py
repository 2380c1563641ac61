"""What every benchmark shares: alternating timings, their medians, and where they were measured."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax


def alternate(functions: dict[str, Callable], *, rounds: int = 7, seconds: float = 0.2) -> dict[str, list[float]]:
    """Times functions in turn, A B C A B C ..., so that a drift of the machine's speed hits all alike.

    Args:
        functions: each is called without arguments and returns something to wait for.
        rounds: timings of each.
        seconds: a timing repeats a call until about this long has passed.

    Returns:
        Seconds a call, one figure for each round. The first call of each, which compiles, is not counted.
    """
    repeats = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        start = time.perf_counter()
        jax.block_until_ready(function())
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    timings = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                result = function()
            jax.block_until_ready(result)
            timings[name].append((time.perf_counter() - start) / repeats[name])
    return timings


def ratio(timings: dict[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of `over`'s time divided by `under`'s in the same round."""
    return statistics.median(a / b for a, b in zip(timings[over], timings[under], strict=True))


def median(timings: dict[str, list[float]], name: str) -> float:
    """Median seconds of one function."""
    return statistics.median(timings[name])


def machine() -> dict[str, str]:
    """Where and with what a figure was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": str(os.cpu_count()),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def report(name: str, rows: list[dict], output: Path | None) -> None:
    """Prints rows as an aligned table and, if `output` is given, keeps them as JSON with the machine they come from."""
    where = machine()
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in where.items()))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_show(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"name": name, "machine": where, "rows": rows}, indent=2) + "\n")


def _show(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
