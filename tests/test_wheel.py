"""The wheel holds both packages and all that they need, and installs into an empty environment."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_it_holds_both_packages_whole_and_nothing_else(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "sparsejax", "pallas_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside >= set(tracked.stdout.split())
    assert {name.split("/")[0] for name in inside} == {"sparsejax", "pallas_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_it_installs_into_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    program = (
        "import jax.numpy as jnp, optax, sparsejax, pallas_kernels\n"
        "tx = sparsejax.sparsify(optax.adam(1e-2), sparsejax.rigl(0.5))\n"
        "p = {'w': jnp.ones((8, 8))}; s = tx.init(p); u, s = tx.update(p, s, p)\n"
        "print(int(jnp.count_nonzero(optax.apply_updates(p, u)['w'])))\n"
    )
    ran = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.strip() == "32", ran.stderr
