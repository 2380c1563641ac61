"""The device-less compiler: its command, the readers of compiler dumps, and, where compilers are installed, budgets."""

import importlib
import re

import pytest

from benchmarks import splash_programs
from pallas_kernels import aot, static_report
from pallas_kernels.block_sparse_attention import programs


def write_tpu_dump(folder):
    """Two bodies of 30 and 40 bundles with a matrix instruction each, inside a loop of 73."""
    lines = ["= control target key end", "", "     0   :  { %s1 = a }", "   0x1   :  { %s2 = b } /* Start region 1 */"]
    lines.append("   0x2 LB: > { %s3 = c } /* Start region 2 */")
    lines += ["   0x3   : > { %v = vmatmul.bf16 }"] + ["   0x4   : > { %v = x }"] * 28
    lines += ["   0x5   : > { %v = x } /* End region 2 */", "   0x6 PF: > { %v = y } /* Start region 3 */"]
    lines += ["   0x7   : > { %v = vmatmul.bf16 }"] + ["   0x8   : > { %v = x }"] * 38
    lines += ["   0x9   : > { %v = x } /* End region 3 */", "   0xa   : > { %v = z } /* End region 1 */"]
    (folder / "12-kernel.1-72-final_bundles.txt").write_text("\n".join(lines))
    (folder / "12-kernel.1-02-original.txt").write_text(
        "  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'core index']\n"
        "  #allocation1 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'scratch operand']\n"
        "  #allocation2 [shape = 'u8[64]{0}', space=smem, size = 0x40, scoped, tag = 'prefetched SMEM operand 0']\n"
    )
    (folder / "12-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(
        "== CAPACITY:\nVALU, VLOAD:FILL, VSTORE:SPILL\n4 3 1\n== UTILIZATION:\n1 0 0\n1 2 1\n"
    )


def test_reads_a_tpu_dump(tmp_path):
    write_tpu_dump(tmp_path)
    (kernel,) = static_report.read_tpu_dump(tmp_path)
    assert kernel == static_report.TpuKernel(
        name="kernel.1", bodies=(30, 40), step_rest=3, matmuls=(1, 1), spills=3, vmem_bytes=4096, smem_bytes=64
    )


def test_reads_a_gpu_dump(tmp_path):
    (tmp_path / "k_0.ptxas").write_text(
        "ptxas . 8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info : Used 168 registers, used 16 barriers, 17 bytes smem\n"
    )
    (tmp_path / "k_0.ptx").write_text("wgmma.mma_async.sync ...\n" * 3)
    (tmp_path / "k_1.resources.txt").write_text("Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)")
    assert static_report.read_gpu_dump(tmp_path) == [static_report.GpuKernel("k", 168, 20, 1041, 3)]


def test_words_become_a_shape():
    shape = aot.parse_shape("block_sparse_attention", ["heads=4", "dtype=float32"])
    assert shape == programs.Shape(heads=4, dtype="float32")


@pytest.mark.parametrize("word", ["head=4", "heads", "heads=four"])
def test_wrong_words_are_named(word):
    with pytest.raises(ValueError, match=re.escape(repr(word))):
        aot.parse_shape("block_sparse_attention", [word])


@pytest.mark.parametrize(("target", "extra"), [("v5e", "aot-tpu"), ("h200", "aot-gpu")])
def test_says_what_to_install(target, extra, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aot.main(["--target", target, "--kernel", "block_sparse_attention"]) == 1
    assert f"pip install 'sparsejax[{extra}]'" in capsys.readouterr().err


def compiled(target, kernel="block_sparse_attention", shape=None):
    """The kernels of all programs, or a skip that says what is not installed."""
    lacking = aot.missing(target)
    if lacking:
        pytest.skip(lacking)
    shape = programs.Shape() if shape is None else shape
    return [k for report in aot.compile_for(target, kernel, shape) for k in report.kernels]


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("name", programs.SHAPES)
def test_compiles_for_tpu(target, name):
    kernels = compiled(target, shape=programs.SHAPES[name])
    assert len(kernels) in (2, 3)
    assert all(kernel.smem_bytes < 2**20 for kernel in kernels)


@pytest.mark.aot
@pytest.mark.parametrize("name", [n for n, shape in programs.SHAPES.items() if shape.dtype != "float32"])
def test_compiles_for_h200_without_spills(name):
    kernels = compiled("h200", shape=programs.SHAPES[name])
    assert {k.name: k.spill_bytes for k in kernels} == {
        f"block_sparse_attention_{part}": 0 for part in ("forward", "dq", "dkv")
    }


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_bundles_of_an_active_tile_stay_near_splash(target):
    separate = compiled(target, shape=programs.Shape())
    ours = {part: k for k in separate for part in ("forward", "dq", "dkv") if f"_{part}" in k.name}
    assert len(ours) == 3
    splash = compiled(target, "benchmarks.splash_programs", splash_programs.Shape())
    theirs = {part: k for k in splash for part in ("fwd", "dq", "dkv") if f"_{part}" in k.name}
    for part, kernel in ours.items():
        assert kernel.bodies[0] <= 1.06 * theirs["fwd" if part == "forward" else part].bodies[0]
