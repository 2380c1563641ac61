"""A save that fails on one process fails on all, at once: in Orbax the others wait for that one for five minutes."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import jax

from pallas_kernels.compat import coordination_client

_saves = itertools.count()  # all processes save in the same order, so that equal numbers mean the same save
_POLL = 0.5, 8.0  # seconds between two looks at what the others say, at first and at most


class SaveError(Exception):
    """What could not be saved, and by which process where there are several."""


class JointSave:
    """A save in the background, of all processes of the job.

    Args:
        start: begins it and returns Orbax's response, whose `result` waits for its end.

    Raises:
        Exception: whatever `start` raises; the others are told.
    """

    def __init__(self, start: Callable):
        self._client, self._key = coordination_client(), f"sparsejax/save/{next(_saves)}"
        try:
            self._response = start()
        except Exception as error:
            self._tell(error)
            raise
        if self._client is not None:
            # Asked for in a thread, so that the others know of a failure before this process comes to `wait`.
            self._outcome: Future = Future()
            threading.Thread(target=self._finish, daemon=True, name="save").start()

    def wait(self) -> None:
        """Waits until the save is on disk.

        Raises:
            SaveError: it failed, here or on another process.
        """
        if self._client is None:
            try:
                self._response.result()
            except Exception as error:  # whatever Orbax and its writers raise
                raise SaveError(_in_words(error)) from error
            return
        pause, most = _POLL
        while not wait([self._outcome], pause).done:
            if failure := self._failure():
                raise SaveError(failure)
            pause = min(2 * pause, most)
        if error := self._outcome.exception():
            raise SaveError(self._failure() or _in_words(error)) from error

    def _finish(self) -> None:
        try:
            self._response.result()
        except Exception as error:
            self._tell(error)
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(None)

    def _tell(self, error: Exception) -> None:
        if self._client is None:
            return
        signed = f"process {jax.process_index()} ({socket.gethostname()}): {_in_words(error)}"
        with contextlib.suppress(Exception):  # another one failed first, which may be why this one did
            self._client.key_value_set(f"{self._key}/failure", signed)

    def _failure(self) -> str:
        """What the process that failed first has told, or nothing."""
        told = self._client.key_value_dir_get(f"{self._key}/")
        return told[0][1] if told else ""


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
