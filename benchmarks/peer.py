"""The process side of `turns.Peer`: times functions of other libraries when told to. Needs neither JAX nor numpy.

Torch, scipy and JAX slow each other down in one process, since their thread pools fight for the same cores. So this
process waits on its input while the other one works.
"""

import sys
import time
from collections.abc import Callable


def serve(functions: Callable[[str], dict[str, Callable]]) -> None:
    """Obeys `load FILE` and `time NAME`, one a line, and answers with names or seconds.

    Args:
        functions: makes functions of no arguments by name from a numpy archive.
    """
    known: dict = {}
    print("ready now", flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "load":
            known = functions(rest)
            print("loaded " + ",".join(known), flush=True)
            continue
        print(f"seconds {seconds(known[rest])}", flush=True)


def seconds(function: Callable) -> float:
    """The least of a few calls, or a single long one, after one untimed call that wakes threads and caches."""
    function()
    timings: list[float] = []
    begin = time.perf_counter()
    while len(timings) < 2 or (len(timings) < 6 and time.perf_counter() - begin < 0.1):
        start = time.perf_counter()
        function()
        timings.append(time.perf_counter() - start)
        if timings[0] > 0.25:
            break
    return min(timings)
