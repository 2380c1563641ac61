"""Runs an experiment: every algorithm under every seed, each in a folder of its own, and the report."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

from experiments.algorithms import ignored_options
from experiments.experiment import Experiment, Task, UsageError
from experiments.machines import Machines
from experiments.metrics import MetricsLog, read_records
from experiments.processes import agree, from_first
from experiments.report import build_report, print_table
from experiments.train import DivergedError, train
from experiments.variant import Variant

# What may differ between a run and its resumption.
_NOT_OF_THE_RUN = ("algorithms", "seeds", "output", "resume", "keep_checkpoints")


def run_experiment(
    experiment: Experiment,
    config,
    *,
    progress: bool = True,
    machines: Machines = Machines(),  # noqa: B008 (frozen)
) -> Path:
    """Trains all algorithms and seeds of a configuration, builds the report and prints the table.

    Args:
        experiment: the experiment.
        config: its configuration.
        progress: show progress bars.
        machines: the devices and processes to run on.

    Returns:
        The experiment's folder.

    Raises:
        UsageError: the configuration cannot be run, or the folder has runs of the same names or of other settings.
        DivergedError: after everything else has run, that some runs ended in what is no number.
        DisagreementError: processes were started with different configurations or data.
    """
    check_config(config)
    machines.start()
    layout = machines.layout()
    folder = Path(from_first(lambda: str(output_folder(experiment.name, config)), machines.patience))
    try:
        task = experiment.task(config)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    agree(dataclasses.asdict(config) | {"data": task.digest, "mesh": machines.mesh}, machines.patience)
    try:
        variants = [Variant(experiment, config, name, task, layout) for name in config.algorithms]
    except ValueError as error:
        raise UsageError(str(error)) from error
    diverged = []
    if machines.first:
        print(f"{experiment.name}: {len(variants)} algorithms x {len(config.seeds)} seeds, into {folder}", flush=True)
        for note in ignored_options(config, experiment.config):
            print(f"note: {note}", flush=True)
    for variant in variants:
        for seed in config.seeds:
            run = folder / variant.name / f"seed{seed}"
            prepare = functools.partial(_prepare, experiment, variant, task, run, seed)
            if not from_first(prepare, machines.patience):
                continue
            shown = progress and machines.first
            try:
                train(variant, run, seed, resume=config.resume, progress=shown, machines=machines)
            except DivergedError as error:
                diverged.append(f"{variant.name} seed {seed}")
                if machines.first:
                    print(f"{diverged[-1]} diverged: {error}", file=sys.stderr, flush=True)
                    with MetricsLog(run / "metrics.jsonl", after=config.steps) as log:
                        log.write("final", max((r["step"] for r in log.records), default=0), diverged=True)
    if machines.first:
        page = build_report(folder)
        print_table(folder)
        print(f"report: {page}")
    if diverged:
        raise DivergedError(f"{len(diverged)} of the runs diverged: {', '.join(diverged)}")
    return folder


def output_folder(name: str, config) -> Path:
    """Where an experiment's runs go: `--output`, or the first of runs/NAME, runs/NAME-2, ... without such runs.

    With `--resume` it is the last of these that exists.

    Raises:
        UsageError: `--output` has runs that would be overwritten.
    """
    numbered = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000))
    if config.resume and not config.output:
        taken = [path for path in numbered if path.exists()]
        return taken[-1] if taken else Path("runs") / name
    if not config.output:
        return next(path for path in numbered if not path.exists())
    folder = Path(config.output)
    clashes = [path for path in _run_folders(folder, config) if path.exists()]
    if clashes and not config.resume:
        raise UsageError(f"{clashes[0]} exists already; continue it with --resume, or choose another --output")
    return folder


def _run_folders(folder: Path, config) -> list[Path]:
    return [folder / name / f"seed{seed}" for name in config.algorithms for seed in config.seeds]


def _prepare(experiment: Experiment, variant: Variant, task: Task, folder: Path, seed: int) -> bool:
    """Writes down what a run is; False where it is finished already."""
    resume = variant.config.resume
    described = {
        name: value for name, value in dataclasses.asdict(variant.config).items() if name not in _NOT_OF_THE_RUN
    }
    described |= {"experiment": experiment.name, "variant": variant.name, "seed": seed, "data": task.digest}
    described = json.loads(json.dumps(described))
    path = folder / "config.json"
    for other in sorted(folder.parent.parent.glob("*/seed*/config.json")):
        _check_same(other, described, resumed=other == path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(described, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"nothing can be written into {folder}: {error}; choose another --output") from error
    try:
        final = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "final"]
    except ValueError as error:
        raise UsageError(f"{error}; remove {folder} to train it anew") from error
    if resume and final:
        print(f"{variant.name} seed {seed}: {'diverged' if final[-1].get('diverged') else 'finished'} already")
        return False
    return True


def _check_same(path: Path, described: dict, *, resumed: bool) -> None:
    """Runs of a folder make one table, so that they must not differ in more than algorithm and seed."""
    try:
        before = json.loads(path.read_bytes().decode())
        names = ["experiment", *before, *described]
        before["experiment"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no run's configuration ({error!r}): remove {path.parent}, or choose another --output"
        ) from error
    for name in names:
        was, now = before.get(name), described.get(name)
        if json.dumps(was) == json.dumps(now) or (name in ("variant", "seed") and not resumed):
            continue
        if name in ("experiment", "data"):
            remedy = "" if name == "experiment" else "the data of this machine differ; "
        else:
            remedy = f"pass {_as_typed(name, was)}, or " if name in before else ""
        begun = "cannot be resumed" if resumed else "cannot share a table"
        raise UsageError(
            f"{path.parent} was started with {name}={was} and {begun} with {name}={now}: {remedy}start anew in another "
            "--output"
        )


def _as_typed(name: str, value) -> str:
    """A field as it is given on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return " ".join([f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value) or "''"])])


def check_config(config) -> None:
    """Raises `UsageError` for what no experiment can do."""
    for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "update_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be 1 or more")
    for name in ("algorithms", "seeds"):
        if not getattr(config, name):
            raise UsageError(f"{name} is empty; give at least one")
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise UsageError(f"{name} {' '.join(map(str, getattr(config, name)))}: one is given twice")
    for seed in config.seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed {seed} is out of range; seeds are 0 to 2**32 - 1")
