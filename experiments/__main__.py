"""The command line of the experiments.

usage: python -m experiments list
       python -m experiments run NAME [--field value ...]     (run NAME --help shows the fields)
       python -m experiments report FOLDER
       python -m experiments compile NAME --target v5p:8x8x8 [--mesh 64 8 1] [--field value ...]

`run` trains, writes results into runs/NAME of the current folder (or --output FOLDER) and prints a table; it
continues what was interrupted with --resume. `report` makes the table and the page of a results folder anew.
`compile` compiles the training step of an experiment, or of byte_pod, for a pod that need not be there.
Studies of single papers (quest, seer_attention, spark_digits, wafers, volumes) take minutes, and begin anew each time.
"""

import difflib
import os
import sys
import traceback

USAGE = __doc__.split("\n", 2)[2]
REFUSED = 2  # exit status where starting again would not help


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows `python -m experiments`; by default what the process was given.

    Returns:
        The exit status: 0, 1 where something could not be done, 2 for a command or a configuration that is refused.
    """
    match sys.argv[1:] if arguments is None else arguments:
        case ["list"]:
            return _list()
        case ["run", name, *fields] if not name.startswith("-"):
            return _run(name, fields)
        case ["compile", name, *fields] if not name.startswith("-"):
            return _compile(name, fields)
        case ["report", folder] if not folder.startswith("-"):
            return _report(folder)
        case ["-h" | "--help" | "help", *_] | ["run" | "list" | "report" | "compile", "-h" | "--help", *_]:
            print(USAGE)
            return _list()
        case ["run"]:
            return _refuse(f"run needs the name of an experiment: {', '.join(_experiments())}")
        case ["compile"]:
            return _refuse("compile needs the name of an experiment, or byte_pod, and --target, such as v5p:8x8x8")
        case ["report", *_]:
            return _refuse("report needs one folder, such as runs/digits_dst")
        case []:
            return _refuse("no command")
        case [command, *_]:
            return _refuse(f"no command {command!r}{_similar(command, ['list', 'run', 'report', 'compile'])}")


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
    from experiments.machines import PREEMPTED, Machines, Preempted
    from experiments.processes import DisagreementError, LateError
    from experiments.runs import run_experiment
    from experiments.train import DivergedError
    from sparsejax.checkpoint import CheckpointError

    experiment = experiments[name]
    config, machines = _parse(tyro, name, experiment.config, fields, Machines(), alone=isinstance(experiment, Study))
    failures = (CheckpointError, DisagreementError, LateError, DivergedError)
    try:
        if isinstance(experiment, Study):
            experiment.run(config)
        else:
            run_experiment(experiment, config, machines=machines)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(REFUSED, machines)
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(1, machines)
    except Preempted as notice:
        print(f"{notice}; the same command with --resume continues", file=sys.stderr)
        return _leave(PREEMPTED, machines)
    except Exception:
        if not machines.coordinator:
            raise
        traceback.print_exc()
        return _leave(1, machines)
    except KeyboardInterrupt:
        again = "" if isinstance(experiment, Study) else "; the same command with --resume continues"
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    return 0


def check(arguments: list[str]) -> int:
    """What `main` says of a run before anything is started: for launchers, so that one process says it.

    Args:
        arguments: as those of `main`.

    Returns:
        The exit status; 0 where nothing is wrong.
    """
    from experiments.experiment import Study, UsageError
    from experiments.machines import Machines
    from experiments.runs import check_config

    match arguments:
        case ["run", name, *fields] if name in _experiments():
            experiment = _experiments()[name]
        case ["run", *_]:
            return main(arguments)  # says what is known
        case _:
            return _refuse("several processes take `run NAME ...` only")
    if isinstance(experiment, Study):
        return _refuse(f"{name} is a study, which runs in one process: python -m experiments run {name}")
    import tyro

    try:
        check_config(_parse(tyro, name, experiment.config, fields, Machines(), alone=False)[0])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _compile(name: str, fields: list[str]) -> int:
    import tyro

    from experiments.compile import BYTE_POD, CompileError, Target, run
    from experiments.configs import EXPERIMENTS
    from experiments.experiment import UsageError

    if name not in (*EXPERIMENTS, BYTE_POD):
        known = (*EXPERIMENTS, BYTE_POD)
        return _refuse(f"no experiment {name!r}{_similar(name, known)}; known are {', '.join(known)}")
    if name == BYTE_POD:
        from experiments.models.byte_pod import Config

        config = Config()
    else:
        config = EXPERIMENTS[name].config

    def both(target: Target, config: type(config) = config):
        return target, config

    both.__doc__ = f"Compiles the training step of {name} for a pod."
    target, config = tyro.cli(
        both, args=fields, config=(tyro.conf.OmitArgPrefixes,), prog=f"python -m experiments compile {name}"
    )
    try:
        return run(name, config, target)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(tyro, name: str, config, fields: list[str], machines, *, alone: bool):
    """The configuration and, beside it, on what to run it, from one list of flags; a study has only the former."""
    program = f"python -m experiments run {name}"
    if alone:
        return tyro.cli(type(config), args=fields, default=config, prog=program), machines

    def both(config: type(config) = config, machines: type(machines) = machines):
        return config, machines

    both.__doc__ = type(config).__doc__
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(both, args=fields, config=flat, prog=program)


def _leave(status: int, machines) -> int:
    """Ends one process of several at once: in the ordinary way it would wait for those that hang without it."""
    if machines.coordinator and status in (1, REFUSED):
        from experiments.processes import leave_together

        sys.stderr.flush()
        leave_together()
        os._exit(status)
    return status


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
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
