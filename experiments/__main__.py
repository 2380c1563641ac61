"""The command line of the experiments.

usage: python -m experiments list
       python -m experiments run NAME [--field value ...]     (run NAME --help shows the fields)
       python -m experiments report FOLDER

`run` trains, writes results into runs/NAME of the current folder (or --output FOLDER) and prints a table; it
continues what was interrupted with --resume. `report` makes the table and the page of a results folder anew.
Studies of single papers (quest, seer_attention) take minutes, and begin anew each time.
"""

import difflib
import sys

USAGE = __doc__.split("\n", 2)[2]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows `python -m experiments`; by default what the process was given.

    Returns:
        The exit status: 0, 1 where something could not be done, 2 for a command that cannot be understood.
    """
    match sys.argv[1:] if arguments is None else arguments:
        case ["list"]:
            return _list()
        case ["run", name, *fields] if not name.startswith("-"):
            return _run(name, fields)
        case ["report", folder] if not folder.startswith("-"):
            return _report(folder)
        case ["-h" | "--help" | "help", *_] | ["run" | "list" | "report", "-h" | "--help", *_]:
            print(USAGE)
            return _list()
        case ["run"]:
            return _refuse(f"run needs the name of an experiment: {', '.join(_experiments())}")
        case ["report", *_]:
            return _refuse("report needs one folder, such as runs/digits_dst")
        case []:
            return _refuse("no command")
        case [command, *_]:
            return _refuse(f"no command {command!r}{_similar(command, ['list', 'run', 'report'])}")


def _experiments():
    from experiments.configs import EXPERIMENTS  # takes seconds to import, which bad usage need not wait for
    from experiments.papers import STUDIES

    return EXPERIMENTS | STUDIES


def _list() -> int:
    width = max(map(len, _experiments()))
    for name, experiment in _experiments().items():
        print(f"{name:{width}}  {experiment.summary}")
    return 0


def _run(name: str, fields: list[str]) -> int:
    experiments = _experiments()
    if name not in experiments:
        return _refuse(f"no experiment {name!r}{_similar(name, experiments)}; known are {', '.join(experiments)}")
    import tyro

    from experiments.experiment import Study, UsageError
    from experiments.runs import run_experiment
    from sparsejax.checkpoint import CheckpointError

    experiment = experiments[name]
    config = tyro.cli(
        type(experiment.config), args=fields, default=experiment.config, prog=f"python -m experiments run {name}"
    )
    try:
        if isinstance(experiment, Study):
            experiment.run(config)
        else:
            run_experiment(experiment, config)
    except (UsageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "" if isinstance(experiment, Study) else "; the same command with --resume continues"
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    return 0


def _report(folder: str) -> int:
    from experiments.report import build_report, print_table
    from experiments.results import ReportError

    try:
        page = build_report(folder)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(folder)
    print(f"report: {page}")
    return 0


def _similar(name: str, known) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f", did you mean {found[0]!r}?" if found else ""


def _refuse(problem: str) -> int:
    print(f"error: {problem}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
