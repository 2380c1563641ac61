"""What the tests of GPU kernels share: lowering and compiling for an H200 that is not there."""

import jax
import pytest
from jax import export

from pallas_kernels import aot, compat


def assert_lowers(programs, shape, kernels: int) -> None:
    """Each program of a shape holds at least so many kernels of ours after lowering."""
    for function, arguments in programs.programs(shape, "gpu", jax.ShapeDtypeStruct).values():
        with compat.target_context("NVIDIA H200", 132, "gpu"):
            text = export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()
        assert text.count("mosaic_gpu") >= kernels


def assert_compiles_without_spills(kernel: str, shape, parts: set[str]) -> None:
    """Compiles a shape of a kernel; skips where the compiler is not installed."""
    lacking = aot.missing("h200")
    if lacking:
        pytest.skip(lacking)
    (report,) = aot.compile_for("h200", kernel, shape)
    assert {k.name for k in report.kernels} == {f"{kernel}_{part}" for part in parts}
    assert [k.spill_bytes for k in report.kernels] == [0] * len(report.kernels)
