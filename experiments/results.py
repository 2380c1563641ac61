"""Reads the run folders of an experiment back, finished or not, and puts each method's seeds together."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from experiments.metrics import read_records

HIGHER_IS_BETTER = {"accuracy": True, "bits_per_byte": False}


class ReportError(ValueError):
    """A folder that no report can be made of."""


@dataclass(frozen=True)
class Run:
    """One seed of one method, as far as it got.

    Attributes:
        method: the variant's name.
        seed: its seed.
        config: the contents of `config.json`.
        records: `{kind: records in order of steps}` for `train`, `eval` and `masks`.
        final: the closing record; None while the run has not ended.
    """

    method: str
    seed: int
    config: dict
    records: dict[str, list[dict]]
    final: dict | None

    @property
    def step(self) -> int:
        """The last step that anything was recorded of."""
        everything = [record["step"] for records in self.records.values() for record in records]
        return max([*everything, self.final["step"] if self.final else 0])

    @property
    def diverged(self) -> bool:
        """Whether the run ended in a loss or a metric that is no number."""
        if self.final is None:
            return False
        found = [self.final.get("loss", 0.0), *(self.final[m] for m in HIGHER_IS_BETTER if m in self.final)]
        return bool(self.final.get("diverged")) or len(found) < 2 or not all(map(_finite, found))

    def curve(self, kind: str, value) -> tuple[list[int], list[float]]:
        """Steps and `value(record)` of the records of a kind; records without a value (None) are left out."""
        points = [(record["step"], value(record)) for record in self.records[kind]]
        return [s for s, v in points if v is not None], [v for _, v in points if v is not None]


@dataclass(frozen=True)
class Row:
    """One method over its seeds.

    Attributes:
        method: the variant's name.
        metric: `accuracy` (fraction) or `bits_per_byte`.
        mean: mean of the finished seeds' final metric; None before one has ended.
        std: their sample standard deviation; None for fewer than two.
        finished: how many seeds have ended.
        seeds: how many were started.
        diverged: how many ended in what is no number; none of their figures is in a mean.
        sparsity: actual sparsity of the prunable weights.
        nnz: prunable weights kept, the mean over seeds.
        size: prunable weights.
        training_flops: of the whole run over those of the dense one.
        inference_flops: of a forward pass over those of the dense one.
        explored: share of the prunable weights active at some time (in-time over-parameterisation rate).
        execution: `dense`, `simulated` or `accelerated`.
        seconds: mean duration of a run.
    """

    method: str
    metric: str
    mean: float | None
    std: float | None
    finished: int
    seeds: int
    diverged: int = 0
    sparsity: float | None = None
    nnz: int | None = None
    size: int | None = None
    training_flops: float | None = None
    inference_flops: float | None = None
    explored: float | None = None
    execution: str = "-"
    seconds: float | None = None


def load_runs(folder: str | Path) -> list[Run]:
    """Reads every `<method>/seed<k>/` of an experiment's folder.

    Args:
        folder: `runs/<experiment>`.

    Returns:
        The runs, by method and seed.

    Raises:
        ReportError: when the folder does not exist, holds no runs, or a file in it can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give the folder of an experiment, such as runs/digits_dst")
    configs = sorted(folder.glob("*/seed*/config.json"))
    if not configs:
        raise ReportError(f"{folder} holds no runs (no <method>/seed<k>/config.json in it){_hint(folder)}")
    return sorted((_load_run(path.parent) for path in configs), key=lambda run: (run.method, run.seed))


def aggregate(runs: list[Run]) -> list[Row]:
    """Puts the seeds of each method together.

    Args:
        runs: from `load_runs`.

    Returns:
        A `Row` for each method: dense ones first, then from best to worst, then those without a result yet.

    Raises:
        ReportError: when the runs measure different things.
    """
    metric = metric_of(runs)
    groups = defaultdict(list)
    for run in runs:
        groups[run.method].append(run)
    rows = [_row(method, metric, group) for method, group in groups.items()]
    sign = -1 if HIGHER_IS_BETTER[metric] else 1
    return sorted(rows, key=lambda r: (r.execution != "dense", r.mean is None, sign * (r.mean or 0), r.method))


def metric_of(runs: list[Run]) -> str:
    """The quality that the runs measure, `accuracy` or `bits_per_byte`; `accuracy` before anything was measured."""
    records = [r for run in runs for r in [*run.records["eval"], *([run.final] if run.final else [])]]
    found = [metric for metric in HIGHER_IS_BETTER if any(metric in record for record in records)]
    if len(found) > 1:
        raise ReportError(f"the runs measure different things, {' and '.join(found)}: report them in separate folders")
    return found[0] if found else "accuracy"


def churn(record: dict) -> float | None:
    """Share of the weights kept before a `masks` record that it dropped; None for the first masks of a run."""
    if record["step"] == 0:
        return None
    layers = record["layers"].values()
    dropped = sum(layer["dropped"] for layer in layers)
    before = sum(layer["nnz"] - layer["added"] + layer["dropped"] for layer in layers)
    return dropped / before if before else None


def layer_density(runs: list[Run]) -> dict[str, float]:
    """Kept share of each layer in the last `masks` record, the mean over runs; empty without records."""
    kept = defaultdict(list)
    for run in runs:
        for path, layer in (run.records["masks"] or [{"layers": {}}])[-1]["layers"].items():
            if layer["size"]:
                kept[path].append(layer["nnz"] / layer["size"])
    return {path: statistics.fmean(shares) for path, shares in kept.items()}


def _row(method: str, metric: str, runs: list[Run]) -> Row:
    ended = [run for run in runs if run.final]
    fine = [run for run in ended if not run.diverged]
    finals = [run.final for run in fine]
    explored = [run.records["masks"][-1].get("exploration") for run in fine if run.records["masks"]]
    if not finals:
        return Row(method, metric, None, None, len(ended), len(runs), diverged=len(ended))
    qualities = [final[metric] for final in finals]

    def mean(key, relative_to=None):
        if any(name and name not in final for name in (key, relative_to) for final in finals):
            return None
        return statistics.fmean(final[key] / (final[relative_to] if relative_to else 1) for final in finals)

    def count(key):
        return None if mean(key) is None else round(mean(key))

    return Row(
        method=method,
        metric=metric,
        mean=statistics.fmean(qualities) if qualities else None,
        std=statistics.stdev(qualities) if len(qualities) > 1 else None,
        finished=len(ended),
        seeds=len(runs),
        diverged=len(ended) - len(fine),
        sparsity=mean("sparsity"),
        nnz=count("nnz"),
        size=count("size"),
        training_flops=mean("training_flops", "dense_training_flops"),
        inference_flops=mean("inference_flops", "dense_inference_flops"),
        explored=statistics.fmean(explored) if explored and None not in explored else None,
        execution=finals[0].get("execution", "-"),
        seconds=mean("seconds"),
    )


def _load_run(folder: Path) -> Run:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method, seed = config["variant"], config["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{folder / 'config.json'} is no run's configuration: {error!r}") from error
    try:
        records = read_records(folder / "metrics.jsonl")
    except ValueError as error:
        raise ReportError(str(error)) from error
    # A resumed run repeats the steps since its last checkpoint: the later record of a step is the one that counts.
    latest = {(record["kind"], record["step"]): record for record in records}
    by_kind = {kind: [] for kind in ("train", "eval", "masks", "final")}
    for (kind, _), record in sorted(latest.items(), key=lambda item: item[0][1]):
        by_kind.setdefault(kind, []).append(record)
    final = by_kind.pop("final")
    return Run(method, seed, config, by_kind, final[-1] if final else None)


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _hint(folder: Path) -> str:
    if (folder / "config.json").exists():
        return f": it is a single run, the experiment is {folder.parent.parent}"
    if any(folder.glob("seed*/config.json")):
        return f": it is a single method, the experiment is {folder.parent}"
    inside = sorted({path.parents[2].name for path in folder.glob("*/*/seed*/config.json")})
    if inside:
        return f": name one of the experiments inside, {', '.join(inside)}"
    return "; `python -m experiments run NAME` makes some"
