"""The README's Python runs as it stands, block after block."""

import re
from pathlib import Path

import jax
import pytest

import sparsejax

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parent.parent / "README.md").read_text(), re.M | re.S)


def run(blocks):
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_every_block_runs(capsys):
    blocks = [block for block in BLOCKS if "equinox" not in block]
    assert len(blocks) == len(BLOCKS) - 1
    run(blocks)
    assert "simulated" in capsys.readouterr().out


@pytest.mark.peers
def test_the_equinox_block_runs():
    ran = run([BLOCKS[0], *(block for block in BLOCKS if "equinox" in block)])
    masks = jax.tree.leaves(sparsejax.masks_of(ran["state"]))
    assert sum(mask.size for mask in masks) == 64 * 32 + 32 * 32 + 32 * 10
    assert sum(int(mask.sum()) for mask in masks) == round(0.1 * sum(mask.size for mask in masks))
