"""What the launchers start, and what they refuse to start."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import local
from experiments.machines import PREEMPTED
from experiments.processes import LATE

LAUNCH = Path(local.__file__).parent
CLOUD = {
    "tpu_vm.sh": {"TPU": "slice", "ZONE": "zone", "BUCKET": "gs://bucket/some/runs"},
    "gke.sh": {"CLUSTER": "c", "ZONE": "zone", "PROJECT": "p", "TPU_TYPE": "v5p-8", "BUCKET": "gs://bucket/some/runs"},
}


def dry(script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": "/", "DRY_RUN": "1", **CLOUD[script], **changes}
    return subprocess.run([LAUNCH / script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", CLOUD)
def test_arguments_reach_the_workers_as_they_were_given(script):
    arguments = ["run", "bytes_lm", "--dense-layers", "two words", "it's", "$HOME", '"', "*", "--mesh", "-1", "16", "1"]
    done = dry(script, *arguments)
    assert done.returncode == 0, done.stderr
    last = shlex.split(done.stdout.splitlines()[-1])
    command = last[last.index("--command") + 1]
    assert "--only-dir some/runs bucket" in done.stdout.replace("\\", "")
    said = f"printf '%s\\n' {command[command.index('-m experiments') :]}"  # what bash makes of it on the worker
    heard = subprocess.run(["bash", "-c", said], capture_output=True, text=True)
    words = heard.stdout.splitlines()
    assert words[:2] == ["-m", "experiments"]
    assert words[2 : 2 + len(arguments)] == arguments
    assert words[2 + len(arguments) :][2:4] == ["--coordinator", "auto"]


def test_xpk_restarts_what_a_run_can_go_on_after():
    """By itself it restarts after 42 and 127 to 255 only."""
    words = shlex.split(dry("gke.sh", "run", "bytes_lm").stdout.splitlines()[-1])
    codes = words[words.index("--restart-on-exit-codes") + 1].split(",")
    assert set(map(int, codes)) == {1, PREEMPTED, LATE}


@pytest.mark.parametrize("script", CLOUD)
def test_cloud_scripts_say_what_is_missing(script):
    assert "usage: " in dry(script, "compile", "byte_pod").stderr
    lacking = dry(script, "run", "bytes_lm", ZONE="")
    assert lacking.returncode != 0
    assert "ZONE" in lacking.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "bytes_lm", "--steps", "0"], "error: steps is 0; it must be 1 or more\n"),
        (["run", "quest"], "error: quest is a study, which runs in one process"),
        (["run", "bytes"], "error: no experiment 'bytes', did you mean 'bytes_lm'?"),
        (["list"], "error: several processes take `run NAME ...` only"),
    ],
)
def test_what_cannot_be_run_is_said_once_and_nothing_is_started(monkeypatch, capsys, command, message):
    monkeypatch.setattr(local, "Job", None)
    assert local.main(["--", *command]) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("option", "smallest"), [(["--processes", "0"], 1), (["--devices", "0"], 1), (["--restarts", "-1"], 0)]
)
def test_numbers_that_start_nothing_are_refused(monkeypatch, capsys, option, smallest):
    monkeypatch.setattr(local, "Job", None)
    with pytest.raises(SystemExit) as exit:
        local.main([*option, "--", "run", "bytes_lm"])
    assert exit.value.code == 2
    said = f"argument {option[0]}: {option[1]} is not a whole number of {smallest} or more\n"
    assert capsys.readouterr().err.endswith(said)


def test_what_processes_say_alike_is_shown_once(monkeypatch, capsys):
    """A stand-in for `python -m experiments`: both processes refuse alike, and it is not tried again."""
    refusing = [sys.executable, "-c", "print('error: no data'); print(); raise SystemExit(2)"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(refusing, **options))
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    assert local.main(["--restarts", "3", "--", "run", "bytes_lm"]) == 2
    assert capsys.readouterr().out.split("] ", 1)[1] == "error: no data\n"
