"""Which of several implementations runs a call, and why the others do not. Shared by kernels that have a choice."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

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
    """The platform of the first concrete array ("cpu", "tpu", "gpu"), or the default one."""
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return _family(next(iter(x.devices())).platform)
    return _family(jax.default_backend())


def _family(platform: str) -> str:
    return "gpu" if platform in ("gpu", "cuda", "rocm") else platform


def choose(kernel: str, names: Sequence[str], platform: str, refuses: Callable[[str], str | None]) -> Choice:
    """The first of `names` that does not refuse.

    Args:
        kernel: the function that was asked, for messages.
        names: candidates, best first.
        platform: where the call runs.
        refuses: the reason why a candidate does not take the call, or None.
    """
    refused: dict[str, str] = {}
    for name in names:
        reason = refuses(name)
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
