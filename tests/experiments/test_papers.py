"""Studies of papers: with nothing left out they are the dense model, and the tables hold what the papers claim."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.papers import STUDIES, quest, seer_attention

TINY = {
    **{"width": 16, "depth": 2, "heads": 2, "length": 32, "steps": 3, "batch_size": 2},
    **{"max_bytes": 500_000, "heldout_windows": 2},
}


@pytest.mark.slow
def test_quest_with_every_page_is_dense(tmp_path):
    config = quest.Config(**TINY, prompt=20, page_size=4, pages=(2, 8), timed_length=64, timed_pages=(4,))
    tables = quest.run(dataclasses.replace(config, page_size=4, output=str(tmp_path)), progress=False)
    dense, *others, last, newest = tables["quality"]
    assert [row["method"] for row in (*others, last, newest)] == ["Quest", "first and newest"] * 2
    for row in (last, newest):
        assert row["density"] == row["agrees with dense"] == 1
        np.testing.assert_allclose(row["bits per byte"], dense["bits per byte"], rtol=1e-4)
    assert others[0]["density"] < 0.4
    assert json.loads((tmp_path / "results.json").read_text())["quality"] == tables["quality"]


@pytest.mark.slow
def test_seer_attention_with_every_block_is_dense(tmp_path):
    config = seer_attention.Config(
        **TINY, block=4, gate_dim=4, gate_steps=3, densities=(0.5, 1.0), timed_length=128, timed_densities=(0.5,)
    )
    tables = seer_attention.run(dataclasses.replace(config, output=str(tmp_path)), progress=False)
    dense, *rows = tables["quality"]
    assert len(rows) == 8
    for row in rows[1::2]:
        assert row["density"] == row["agrees with dense"] == 1
        np.testing.assert_allclose(
            [row["attention found"], row["bits per byte"]], [1, dense["bits per byte"]], rtol=1e-4
        )
    for row in rows[::2]:
        assert row["density"] < 0.7
        assert row["maxima found"] <= rows[-2]["maxima found"] + 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quest", "--prompt", "600"], "prompt=600 must be above 0 and below length=512"),
        (["seer_attention", "--block", "60"], "block is 60, which does not divide the length of 512"),
        (["seer_attention", "--densities", "1.5"], "densities are (1.5,); each must be above 0 and at most 1"),
        (["quest", "--steps", "0"], "steps is 0; it must be 1 or more"),
        (["quest", "--max-bytes", "1"], "falls into the training part"),
        (["quest", "--heads", "3"], "heads is 3, which does not divide the width of 128"),
        (["spark_digits", "--size", "18"], "size=18 must be a multiple of 4"),
        (["wafers", "--unknown", "dot"], "unknown=('dot',) must be some of ('ring', 'edge'"),
        (["wafers", "--wafers", "33"], "wafers=33 must be a multiple of batch_size=32"),
        (["volumes", "--side", "10"], "side=10 must be a multiple of 4 and 4"),
    ],
)
def test_impossible_configurations_are_refused(capsys, arguments, message):
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_help_explains_the_study(capsys, name):
    with pytest.raises(SystemExit) as exit:
        main(["run", name, "--help"])
    assert exit.value.code == 0
    assert "folder of results.json" in capsys.readouterr().out


@pytest.mark.slow
def test_quest_stays_closer_to_dense_than_a_window(tmp_path):
    config = quest.Config(pages=(2, 4), timed_length=0, output=str(tmp_path))
    _, *rows = quest.run(config, progress=False)["quality"]
    for ours, window in zip(rows[::2], rows[1::2], strict=True):
        assert ours["density"] < 0.15
        assert ours["agrees with dense"] > window["agrees with dense"]


@pytest.mark.slow
def test_the_gate_chooses_nearly_as_well_as_one_who_knows(tmp_path):
    config = seer_attention.Config(densities=(0.15, 0.5), timed_length=0, output=str(tmp_path))
    dense, *rows = seer_attention.run(config, progress=False)["quality"]
    gate, newest, knowing = rows[:2], rows[4:6], rows[6:]
    for row, window, best in zip(gate, newest, knowing, strict=True):
        assert row["maxima found"] > 0.97 * best["maxima found"]
        assert row["agrees with dense"] > window["agrees with dense"] - 0.005
    assert gate[1]["bits per byte"] < dense["bits per byte"] + 0.03
