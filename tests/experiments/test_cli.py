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
    names = ["digits_dst", "digits_conv", "digits_vit", "bytes_lm"]
    studies = ["quest", "seer_attention", "spark_digits", "wafers", "volumes"]
    assert [line.split()[0] for line in out.splitlines()] == names + studies


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
    ("arguments", "status", "message"),
    [
        (["run", "digits_dst", "--sparsity", "1.5"], 2, "error: "),
        (["run", "bytes_lm", "--length", "100000000"], 2, "error: "),
        (["report", "nowhere"], 1, "error: nowhere is not a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "error: processes is 2 and process 0, but without --coordinator there is one: give"),
        (["--coordinator", "localhost:1234"], "error: processes is 0; --coordinator localhost:1234 needs --proc"),
        (["--coordinator", "auto"], "error: --coordinator auto finds no Cloud TPU, GKE or Slurm here"),
        (["--mesh", "2", "1", "1"], "error: mesh is (2, 1, 1), which does not fit 1 devices"),
    ],
)
def test_machines_that_are_not_there_are_one_line_before_anything_starts(tmp_path, options, message):
    told = ("XLA_FLAGS", "COORDINATOR", "SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_")  # what tells JAX of a cluster
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    ran = subprocess.run(
        [sys.executable, "-m", "experiments", "run", "digits_dst", *TINY, *options],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith(message)
    assert ran.stderr.count("\n") == 1
    assert "--mesh" not in options or "--xla_force_host_platform_device_count=N" in ran.stderr
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
    assert main([*command, "--resume", "--sparsity", "0.5"]) == 2
    assert "was started with sparsity=0.98 and cannot be resumed with sparsity=0.5" in capsys.readouterr().err
    assert main([*command, "--output", "runs/digits_dst"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_runs_of_other_settings_do_not_share_a_table(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "digits_dst", *TINY, "--output", "mixed"]
    assert main([*command, "--algorithms", "dense"]) == 0
    capsys.readouterr()
    assert main([*command, "--algorithms", "static", "--hidden", "9", "4"]) == 2
    err = capsys.readouterr().err
    assert "cannot share a table with hidden=[9, 4]: pass --hidden 8, or start anew in another --output" in err
    assert main(["run", "digits_vit", "--output", "mixed", "--steps", "20", "--algorithms", "static"]) == 2
    assert "was started with experiment=digits_dst and cannot share a table with" in capsys.readouterr().err


def test_a_run_that_diverges_is_no_result_and_the_others_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "run",
        "digits_dst",
        *TINY,
        "--learning-rate",
        "nan",
        "--algorithms",
        "sr_ste",
        "dense",
        "--sparsity",
        "0.9",
    ]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "note: sr_ste keeps 2 of 4 weights, by --n-of-m; --sparsity is not used" in out
    assert "DIVERGED: dense, 1 of 1 seeds" in out
    assert "error: 2 of the runs diverged: sr_ste seed 3, dense seed 3" in err
    text = Path("runs/digits_dst/dense/seed3/metrics.jsonl").read_text()
    assert "NaN" not in text


@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_a_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    assert main(["run", "digits_dst", *TINY, "--algorithms", "dense", "--output", place]) == 2
    assert f"error: nothing can be written into {place}/dense/seed3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"", "is no run's configuration"),
        ("config.json", b"null", "is no run's configuration"),
        ("config.json", b"[1]", "is no run's configuration"),
        ("config.json", b"\xff\xfe", "is no run's configuration"),
        ("metrics.jsonl", b'{"kind": "train"}\n{"kind": "eval", "step": 0}\n', "line 1 is no record: its step is None"),
        ("metrics.jsonl", b'\xff\n{"kind": "eval", "step": 0}\n', "line 1 is no record"),
        ("metrics.jsonl", b'{"kind": "masks", "step": 0}\n{"kind": "eval", "step": 0}\n', "its masks have no layers"),
    ],
)
def test_damaged_folders_are_errors(capsys, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    command = ["run", "digits_dst", *TINY, "--algorithms", "dense"]
    run = Path("runs/digits_dst/dense/seed3")
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"variant": "dense", "seed": 3, "experiment": "digits_dst"}')
    (run / name).write_bytes(content)
    assert main(["report", "runs/digits_dst"]) == 1
    assert message in capsys.readouterr().err
    if name == "config.json":
        assert main([*command, "--resume"]) == 2
        assert f"{message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "0"], "layers of (64, 0, 10) features; each needs 1 or more"),
        (["--seeds", "1", "1"], "seeds 1 1: one is given twice"),
        (["--algorithms", "cyclic"], "cyclic takes 3 cycles and at least 25 steps at update_every=5"),
        (
            ["--algorithms", "iterative", "--steps", "9"],
            "iterative prunes in 10 rounds, which do not fit into 6 of 9 steps",
        ),
    ],
)
def test_configurations_that_cannot_be_run(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits_dst", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err
