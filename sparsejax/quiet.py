"""Reading damaged files through Orbax without the noise that it leaves behind."""

import contextlib
import logging
import sys
import types
import warnings


def read_files(load):
    """Returns what `load()` returns and None, or None and an `OSError` that says why; call it inside `silence`."""
    try:
        return load(), None
    except Exception as error:  # whatever Orbax and its readers raise for damaged files
        return None, OSError(f"{type(error).__name__}: {str(error).strip()[:500]}")


@contextlib.contextmanager
def silence():
    """Keeps quiet what Orbax leaves behind when a read fails.

    It abandons its other reads, and Python reports each of them through loggers, warnings and unraisable exceptions,
    when they end or are collected. So `restore` collects them in here, and lets no exception out that refers to them.
    """
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    before = [logger.disabled for logger in loggers]
    unraisable = sys.unraisablehook

    def hook(report):
        if str(report.exc_value) != "Event loop is closed" and not isinstance(report.object, types.CoroutineType):
            unraisable(report)

    try:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = unraisable
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
