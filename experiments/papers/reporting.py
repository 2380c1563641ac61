"""What every study shares: timings, tables on the terminal, results in a folder."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from sparsejax.analysis.table import text_table


def milliseconds(function: Callable, *arguments) -> float:
    """Median time of a compiled call, over three to seven rounds."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    repeats = max(1, round(0.1 / (time.perf_counter() - start)))
    timings, begin = [], time.perf_counter()
    while len(timings) < 3 or (len(timings) < 7 and time.perf_counter() - begin < 1):
        start = time.perf_counter()
        for _ in range(repeats):
            result = function(*arguments)
        jax.block_until_ready(result)
        timings.append((time.perf_counter() - start) / repeats)
    return 1e3 * statistics.median(timings)


def show(title: str, rows: list[dict]) -> None:
    """Prints rows, dicts of the same keys, as a table."""
    cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
    head = list(rows[0])
    print(f"\n{title}\n{text_table(head, cells, [True, *[False] * (len(head) - 1)])}", flush=True)


def keep(name: str, config, tables: dict[str, list[dict]]) -> Path:
    """Writes `results.json`: the configuration and the tables."""
    folder = Path(config.output or f"runs/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps({"study": name, "config": dataclasses.asdict(config), **tables}, indent=2) + "\n")
    print(f"\nresults: {path}")
    return path
