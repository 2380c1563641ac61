"""Which path of a kernel runs a call, and why the others do not. Shared by kernels that have a choice."""

import dataclasses
import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import jax

IMPLEMENTATIONS = ("reference", "xla", "native", "tpu", "gpu")
_PREFERENCE = {"cpu": ("native", "xla"), "tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}
_HOME = {"native": "cpu", "tpu": "tpu", "gpu": "gpu"}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which path runs a call, and why others do not.

    Attributes:
        kernel: the function that was asked.
        name: the path, or None if every candidate refused.
        platform: where the call runs.
        refused: reason by name of the paths that were tried before.
    """

    kernel: str
    name: str | None
    platform: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.kernel} on {self.platform}: {self.name or 'no implementation'}"]
        return "\n".join(lines + [f"  {name} refused: {reason}" for name, reason in self.refused.items()])


def platform_of(*arrays: Any) -> str:
    """The platform of the first concrete array ("cpu", "tpu", "gpu"), or of the mesh in context, or the default one."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return _family(next(iter(x.devices())).platform)
    device = jax.sharding.get_abstract_mesh().abstract_device  # of a program that is only compiled, not of this machine
    return _family(device.platform if device else jax.default_backend())


def _family(platform: str) -> str:
    return "gpu" if platform in ("gpu", "cuda", "rocm") else platform


@functools.cache
def path(kernel: str, name: str) -> ModuleType:
    """The module of a kernel's path.

    Raises:
        ValueError: if there is no path of that name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r}; allowed: None or one of {', '.join(IMPLEMENTATIONS)}")
    return importlib.import_module(f"pallas_kernels.{kernel}.{name}")


def choose(kernel: str, implementation: str | None, platform: str, *call: Any) -> Choice:
    """The path that was asked for, or the best that takes the call.

    Args:
        kernel: the kernel's package.
        implementation: one of `IMPLEMENTATIONS`, or None.
        platform: where the call runs.
        *call: arguments of `supports` of each path, which returns None or the reason for refusing.

    Raises:
        ValueError: if there is no path of that name.
    """
    names = (implementation,) if implementation else _PREFERENCE.get(platform, ("xla",))
    refused: dict[str, str] = {}
    arrays = [x for x in call if isinstance(x, jax.Array)]
    # What is traced may be compiled for another machine than this one.
    runs_now = bool(arrays) and not any(isinstance(x, jax.core.Tracer) for x in arrays)
    for name in names:
        reason = path(kernel, name).supports(*call)
        if reason is None and runs_now and _HOME.get(name, platform) != platform:
            reason = f"it runs on {_HOME[name]}, and the arrays are on {platform}"
        if reason is None:
            return Choice(kernel, name, platform, refused)
        refused[name] = reason
    return Choice(kernel, None, platform, refused)


def settled(choice: Choice) -> str:
    """The name of the path; logs once why faster ones refused.

    Raises:
        ValueError: if all refused, with their reasons.
    """
    if choice.name is None:
        raise ValueError(str(choice))
    if choice.refused:
        _log_once(str(choice))
    return choice.name


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
