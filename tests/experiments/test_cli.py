"""The command line, as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.configs import EXPERIMENTS

ROOT = Path(__file__).parents[2]
TINY = [
    *("--seeds", "3", "--hidden", "8", "--steps", "20", "--update-every", "5"),
    *("--log-every", "5", "--eval-every", "10", "--save-every", "10"),
]


def test_list_names_the_experiments(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    names = ["digits_dst", "digits_conv", "digits_vit", "bytes_lm", "quest", "seer_attention"]
    assert [line.split()[0] for line in out.splitlines()] == names


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["report", "-h"]])
def test_help_names_commands_and_experiments(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "run NAME [--field value ...]" in out
    assert "digits_dst" in out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_of_an_experiment_explains_every_field(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit:
        main(["run", name, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for field in EXPERIMENTS[name].config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in out
    assert "fraction of zeros in the sparse layers together" in out
    assert "rigl" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command"),
        (["rnu"], "no command 'rnu', did you mean 'run'?"),
        (["run"], "run needs the name of an experiment: digits_dst, digits_conv, digits_vit, bytes_lm"),
        (["run", "digits"], "no experiment 'digits'"),
        (["run", "digits_dts"], "did you mean 'digits_dst'?; known are digits_dst, digits_conv, digits_vit, bytes_lm"),
        (["report"], "report needs one folder"),
    ],
)
def test_bad_commands_say_what_is_known(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [(["--algorithms", "rigel"], "rigl"), (["--sparsty", "0.5"], "--sparsity"), (["--steps", "many"], "many")],
)
def test_bad_fields_say_what_is_allowed(capsys, fields, message):
    with pytest.raises(SystemExit) as exit:
        main(["run", "digits_dst", *fields])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits_dst", "--sparsity", "1.5"], "error: "),
        (["report", "nowhere"], "error: nowhere is not a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_runs_from_an_empty_folder(tmp_path):
    def experiments(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "experiments", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    ran = experiments("run", "digits_dst", "--algorithms", "dense", "static", *TINY)
    assert ran.returncode == 0, ran.stderr
    assert "into runs/digits_dst" in ran.stdout
    assert "static seed 3: 100%" in ran.stderr  # the progress bar
    folder = tmp_path / "runs" / "digits_dst"
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert {"dense", "static"} <= {line[0] for line in lines if line}
    assert {path.name for path in folder.iterdir()} >= {"dense", "static", "report.html", "results.json"}
    config = json.loads((folder / "static" / "seed3" / "config.json").read_text())
    assert {"experiment": "digits_dst", "variant": "static", "seed": 3, "steps": 20}.items() <= config.items()

    (folder / "report.html").unlink()
    again = experiments("report", "runs/digits_dst")
    assert again.returncode == 0, again.stderr
    assert (folder / "report.html").exists()
    assert next(line for line in again.stdout.splitlines() if "static" in line) in ran.stdout


def test_a_second_run_takes_the_next_folder_and_resume_the_last(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "digits_dst", "--algorithms", "dense", *TINY]
    assert main(command) == 0
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits_dst", "digits_dst-2"]
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "into runs/digits_dst-2" in out
    assert "dense seed 3: finished already" in out
    assert main([*command, "--resume", "--sparsity", "0.5"]) == 1
    assert "was started with sparsity=0.98 and cannot be resumed with sparsity=0.5" in capsys.readouterr().err
    assert main([*command, "--output", "runs/digits_dst"]) == 1
    assert "continue it with --resume" in capsys.readouterr().err
