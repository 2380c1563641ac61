"""Two processes of four devices each train one network over loopback, and notice what goes wrong between them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from experiments.metrics import read_records
from experiments.sharding import Layout, make_mesh
from experiments.train import train
from sparsejax.checkpoint import Checkpointer
from sparsejax.masks.paths import named_leaves

HERE = Path(__file__).parent
MASK = "opt_state/masks/blocks/0/up/kernel"


NAMES = ["rigl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stored", "sr_ste"))]


@pytest.fixture(scope="module")
def job(request, tmp_path_factory):
    """The folder of runs in two processes, one for each name that a test asks for, and what both processes found."""
    asked = [item.callspec.params["name"] for item in request.session.items if "name" in _params(item, __file__)]
    names = [name for name in ("sr_ste", "rigl", "stored") if name in asked] or ["rigl"]
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {tiny.FAST_COMPILATION}",
    }
    command = [sys.executable, str(HERE / "two_processes.py"), str(port)]
    logs = [(folder / f"log{index}.txt").open("w+") for index in range(2)]
    workers = [
        subprocess.Popen([*command, str(index), str(folder), ",".join(names)], env=environment, stdout=log, stderr=log)
        for index, log in enumerate(logs)
    ]
    try:
        for worker, log in zip(workers, logs, strict=True):
            worker.wait(600)
            log.seek(0)
            assert worker.returncode == 0, log.read()[-4000:]
    finally:
        for worker, log in zip(workers, logs, strict=True):
            worker.kill()
            worker.wait()
            log.close()
    return folder, [json.loads((folder / f"found{index}.json").read_text()) for index in range(2)]


def _params(item, path: str) -> dict:
    return getattr(getattr(item, "callspec", None), "params", {}) if str(item.path) == path else {}


def saved(run: Path) -> tuple[dict, dict]:
    """The manifest and the leaves of the newest checkpoint."""
    with Checkpointer(run / "checkpoints") as checkpoints:
        step = checkpoints.latest_step
        manifest = ocp.metadata(checkpoints.directory / str(step)).custom_metadata["sparsejax"]["leaves"]
        return manifest, checkpoints.restore({n: np.zeros(r["shape"], r["dtype"]) for n, r in manifest.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_trains_as_one_device_does(job, tmp_path, name):
    """Sums are added in another order, so a weight or two at the edge of the selection may be another one."""
    run = job[0] / name
    train(tiny.variant(name), tmp_path, 0, resume=False, progress=False)
    (_, one), (_, eight) = saved(tmp_path), saved(run)
    masks = [leaf for leaf in one if "masks" in leaf.split("/")]
    assert len(masks) == 6
    for leaf in masks:
        assert one[leaf].sum() == eight[leaf].sum(), leaf
        assert np.mean(eight[leaf] != one[leaf]) < 0.01, leaf
    logs = [read_records(folder / "metrics.jsonl") for folder in (tmp_path, run)]
    losses = [[r["loss"] for r in log if r["kind"] in ("train", "eval")] for log in logs]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_process_writes_the_metrics(job, name):
    records = read_records(job[0] / name / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [4, 8]
    assert [r["kind"] for r in records].count("final") == 1


@pytest.mark.parametrize("name", ["rigl", pytest.param("stored", marks=pytest.mark.slow)])
def test_checkpoints_move_between_meshes_bit_for_bit(job, tmp_path, name):
    """Eight devices of two processes, to four of one, to one, and back to eight."""
    manifest, _ = saved(job[0] / name)
    folder = job[0] / name / "checkpoints"
    for number, shape in enumerate([(2, 2, 1), (1, 1, 1), (1, 4, 2)]):
        variant = tiny.variant(name, Layout(make_mesh(shape, "explicit" if number == 2 else "auto")))
        like = {"train": variant.abstract_state(), "training_flops": 0}
        with Checkpointer(folder) as checkpoints:
            state = checkpoints.restore(like)
        for (path, leaf), sharding in zip(named_leaves(state["train"]), jax.tree.leaves(variant.placed), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        folder = tmp_path / str(number)
        with Checkpointer(folder) as checkpoints:
            checkpoints.save(8, state)
    with Checkpointer(folder) as checkpoints:
        found = ocp.metadata(checkpoints.directory / "8").custom_metadata["sparsejax"]["leaves"]
    assert found == manifest


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("truncated", r"\S+ cannot be read, its files are cut short or not what was written"),
        ("bit", rf"{MASK}: the mask keeps \d+ of \d+ weights, expected \d+"),
        ("dtype", rf"{MASK} was saved as int8 and is asked for as bool"),
        ("no masks", r"was saved without masks: it lacks opt_state/masks/"),
    ],
)
def test_a_damaged_step_is_refused_by_both_processes(job, kind, problem):
    for found in job[1]:
        whole = rf"/8 is damaged: .*{problem}.*; restore step=4, the newest one that verifies$"
        assert re.search(whole, found["damaged"][kind])


@pytest.mark.parametrize("full", [1, 0])
def test_a_full_disk_of_one_process_loses_nothing_saved_before(job, full):
    for found in job[1]:
        who = rf"process {full} \({re.escape(socket.gethostname())}\): \S*Error: "
        said = rf"full{full}/2 could not be saved \({who}.*\); steps saved before are as they were: 1\."
        assert re.search(said, found["full disk"][1 - full])


def test_a_configuration_that_differs_is_refused(job):
    for found in job[1]:
        assert found["facts"].startswith("rate differs between processes: 0.1 on process 0")
        assert "0.2 on process 1" in found["facts"]


def test_copies_that_differ_name_leaf_and_host(job):
    for found in job[1]:
        assert found["copies"].startswith("layer/kernel: its copies are no longer the same; checksum ")
        assert f"on process 0 ({socket.gethostname()})" in found["copies"]
        assert f"on process 1 ({socket.gethostname()})" in found["copies"]


def test_who_is_late_is_named(job):
    first, second = job[1]
    assert "waited 0.5 s for all processes at: a test; process 1 (" in first["late"]
    assert first["late"].endswith("did not come")
    assert second["late"] is None


@pytest.mark.parametrize(
    ("kind", "late"), [("slow", "is still reading the data of step 7"), ("silent", "stopped answering")]
)
def test_a_straggler_is_named(job, kind, late):
    first, second = job[1]
    assert re.fullmatch(rf"process 0 has waited \d s while computing step 7: process 1 \(.*\) {late}", first[kind])
    assert second[kind] is None
