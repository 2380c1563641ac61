"""Several processes that train one network: they start together, agree, and say which of them is late.

All of it goes through JAX's coordination service, which the first process hosts, and none of it through the devices: so
it still answers when a collective operation hangs because one process is missing from it.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping

import jax

from experiments.experiment import UsageError
from pallas_kernels.compat import coordination_client

HEARTBEAT = 100  # seconds after which JAX by default aborts all processes when one is silent; `Watch` names it before
LATE = 75  # exit status of a process that gave up waiting: of sysexits.h, "try again"
_rounds = itertools.count()  # all processes ask in the same order, so that equal numbers mean the same round


class LateError(RuntimeError):
    """Some processes did not come in time; the message names them."""


class DisagreementError(RuntimeError):
    """Processes that must hold the same values do not; the message names the value and the processes."""


def start(coordinator: str, count: int, index: int) -> None:
    """Joins the processes of a job; before anything else is done with JAX.

    Args:
        coordinator: `host:port` of the first process; `auto` where the cluster says all (Cloud TPU, GKE, Slurm).
        count: how many processes; not for `auto`.
        index: which of them this one is, from 0; not for `auto`.

    Raises:
        UsageError: the count or the index is missing or does not fit, or there is no such cluster.
    """
    if coordinator == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:  # where no cluster is found, the first thing that is missing
            raise UsageError(
                f"--coordinator auto finds no Cloud TPU, GKE or Slurm here ({error}): give --coordinator host:port "
                "--processes N --process I, or nothing for one process"
            ) from error
    else:
        if count < 1:
            raise UsageError(
                f"processes is {count}; --coordinator {coordinator} needs --processes N, how many there are, and "
                "--process I, which of them this one is"
            )
        if not 0 <= index < count:
            raise UsageError(f"process is {index}; with --processes {count} it is 0 to {count - 1}")
        jax.distributed.initialize(coordinator, count, index)
    coordination_client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())


def in_words(processes) -> str:
    """Names processes with their hosts.

    Example:
        >>> in_words([3])
        'process 3'
    """
    client = coordination_client()
    hosts = {} if client is None else {key.split("/")[-1]: host for key, host in client.key_value_dir_get("host/")}
    named = [f"{p} ({hosts[str(p)]})" if str(p) in hosts else str(p) for p in sorted(processes)]
    shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    return f"process{'es' if len(named) > 1 else ''} {shown}"


def barrier(what: str, patience: float) -> None:
    """Waits until all processes are here.

    Args:
        what: what they come together for, for the message.
        patience: seconds to wait.

    Raises:
        LateError: some did not come; names them.
    """
    client = coordination_client()
    if client is None:
        return
    key = f"barrier/{next(_rounds)}"
    client.key_value_set(f"{key}/{jax.process_index()}", "")
    try:
        client.wait_at_barrier(key, int(1000 * patience))
    except Exception as error:  # whatever the service raises: what matters is who is missing
        here = {int(name.split("/")[-1]) for name, _ in client.key_value_dir_get(f"{key}/")}
        late = set(range(jax.process_count())) - here
        who = in_words(late) + " did not come" if late else str(error).splitlines()[0]
        raise LateError(f"waited {patience:g} s for all processes at: {what}; {who}") from error


def leave_together(seconds: float = 5.0) -> None:
    """Waits a little for processes that end for the same reason: JAX aborts those that the first one leaves behind."""
    client = coordination_client()
    if client is not None:
        with contextlib.suppress(Exception):  # others may be gone, or have no reason to end
            client.wait_at_barrier("leave", int(1000 * seconds))


def from_first(function: Callable[[], object], patience: float):
    """What a function gives on the first process, on all of them; it runs there alone.

    Args:
        function: without arguments; its result must be what JSON can hold.
        patience: seconds that the others wait.

    Raises:
        UsageError: on all processes, where the first one raised it.
        LateError: the first process does not answer.
    """
    client = coordination_client()
    if client is None:
        return function()
    key = f"first/{next(_rounds)}"
    if jax.process_index() == 0:
        answer = {}
        try:
            answer["result"] = function()
        except UsageError as error:
            answer["error"] = str(error)
            raise
        finally:
            client.key_value_set(key, json.dumps(answer))
        return answer["result"]
    answer = json.loads(_get(client, key, patience, 0))
    if "result" not in answer:
        raise UsageError(answer.get("error", f"{in_words([0])} failed"))
    return answer["result"]


def agree(facts: Mapping[str, object], patience: float) -> None:
    """Compares small facts, such as a configuration, over all processes.

    Args:
        facts: `{name: what JSON can hold}`.
        patience: seconds to wait for the others.

    Raises:
        DisagreementError: names the first fact that differs, and who holds what.
        LateError: names who did not answer.
    """
    client = coordination_client()
    if client is None:
        return
    key = f"facts/{next(_rounds)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(facts)))
    deadline = time.monotonic() + patience
    found = []
    for process in range(jax.process_count()):
        left = max(deadline - time.monotonic(), 1.0)
        found.append(json.loads(_get(client, f"{key}/{process}", left, process)))
    for name in facts:
        values = [json.dumps(each.get(name)) for each in found]
        if len(set(values)) > 1:
            raise DisagreementError(f"{name} differs between processes: {who_holds(values)}")


def who_holds(values: list, shown: Callable[[object], str] = str) -> str:
    """Says which process holds which value, the rarest first.

    Args:
        values: one for each process.
        shown: how to print one.

    Example:
        >>> who_holds([5, 7, 5])
        '7 on process 1; 5 on processes 0, 2'
    """
    holders: dict = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(process)
    rarest = sorted(holders.items(), key=lambda item: (len(item[1]), item[1]))
    return "; ".join(f"{shown(value)} on {in_words(processes)}" for value, processes in rarest)


def _get(client, key: str, patience: float, process: int) -> str:
    try:
        return client.blocking_key_value_get(key, int(1000 * patience))
    except Exception as error:  # whatever the service raises
        raise LateError(f"waited {patience:g} s for an answer of {in_words([process])}") from error


READING, STEPPING, SAVING, RESTORING = "reading the data of", "computing", "saving at", "restoring"


class Watch:
    """Says who is late, and ends this process, when it has waited too long for others.

    A collective operation that one process does not join never returns, and cannot be interrupted. So every process
    posts, about once a second, at which step it is and whether it is busy itself (reading data) or may be waiting
    (computing, saving). One that waits looks at what the others posted: who no longer posts is stopped or dead, who is
    behind is slow. It ends when one has been silent for a twentieth of `patience`, 60 seconds at most; of slow ones it
    says so after a quarter of `patience`, and ends after all of it.

    Args:
        patience: seconds without progress after which to end.
        interval: seconds between two posts.
        end: what is done with the message; by default it is printed and the process ends with status `LATE`.
    """

    def __init__(self, patience: float, interval: float = 1.0, end: Callable[[str], None] | None = None):
        self._client, self._patience, self._interval = coordination_client(), patience, interval
        self._silence = min(max(5 * interval, patience / 20), HEARTBEAT - 40)
        self._end = end or _give_up
        self._at, self._since = (0, READING), time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._key = f"beat/{next(_rounds)}"

    def __enter__(self):
        if self._client is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        if self._client is not None:
            self._thread.join()

    def doing(self, what: str, step: int) -> None:
        """Notes what the process does from now on."""
        self._at, self._since = (step, what), time.monotonic()

    def _run(self) -> None:
        said, looked, seen = False, 0.0, {}
        for beat in itertools.count():
            at = self._at
            post = json.dumps([beat, *at])
            try:
                self._client.key_value_set(f"{self._key}/{jax.process_index()}", post, allow_overwrite=True)
            except Exception:  # the coordinator is gone: JAX ends this process by itself
                return
            if self._stop.wait(self._interval):
                return
            now = time.monotonic()
            if at[1] == READING or self._at != at:
                said, seen = False, {}
                continue
            if now - looked < self._patience / 60:  # what a thousand processes ask of the first one
                continue
            looked, waited, seen = now, now - self._since, self._look(seen, now)
            silent = {process for process, (_, since) in seen.items() if now - since > self._silence}
            ends = bool(silent) or waited > self._patience
            if not ends and (said or waited < self._patience / 4):
                continue
            message = self._who_is_late(*at, waited, seen, silent)
            if self._stop.is_set() or self._at != at:
                continue
            if ends:
                self._end(message)
                return
            print(f"warning: {message}", file=sys.stderr, flush=True)
            said = True

    def _look(self, seen: dict[int, tuple], now: float) -> dict[int, tuple]:
        """The newest post of every other process, and when it was new."""
        found = {int(key.split("/")[-1]): post for key, post in self._client.key_value_dir_get(f"{self._key}/")}
        others = set(range(jax.process_count())) - {jax.process_index()}
        same = {process for process in others & set(seen) if seen[process][0] == found.get(process)}
        return {process: seen[process] if process in same else (found.get(process), now) for process in others}

    def _who_is_late(self, step: int, what: str, waited: float, seen: dict[int, tuple], silent: set[int]) -> str:
        at = {process: json.loads(post)[1:] for process, (post, _) in seen.items() if post and process not in silent}
        slow = [p for p, (s, w) in sorted(at.items()) if s < step or (s == step and w == READING)]
        parts = [f"{in_words(silent)} stopped answering"] if silent else []
        parts += [f"{in_words([p])} is still {at[p][1]} step {at[p][0]}" for p in slow]
        who = "; ".join(parts) or "all answer and none is behind: look at the network"
        return f"process {jax.process_index()} has waited {waited:.0f} s while {what} step {step}: {who}"


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(LATE)  # the thread that waits in a collective operation cannot be reached


def digest(value) -> int:
    """A checksum of what JSON can hold.

    Example:
        >>> digest({"seed": 1}) == digest({"seed": 2})
        False
    """
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
