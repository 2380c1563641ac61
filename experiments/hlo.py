"""What compiled programs say about the traffic between devices."""

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_COUNT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collective operations of a program, on each device.

    Attributes:
        calls: `{kind: how often}` in one run of the program; a loop counts as often as it runs.
        bytes: `{kind: bytes of results}` likewise.
        open_calls: `{kind: how often}` in one pass of loops of which the compiler does not know how often they run.
        open_bytes: `{kind: bytes of results}` likewise.
    """

    calls: Counter
    bytes: Counter
    open_calls: Counter
    open_bytes: Counter

    @property
    def total(self) -> int:
        """Bytes of all kinds, open loops as one pass."""
        return sum(self.bytes.values()) + sum(self.open_bytes.values())


def traffic(text: str) -> Traffic:
    """Adds up the collective operations of a compiled program, `compiled.as_text()`.

    Of the branches of a condition all count, as if each ran.

    Example:
        >>> text = '''ENTRY %main (x: f32[8]) -> f32[8] {
        ...   ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}
        ... }'''
        >>> dict(traffic(text).bytes)
        {'all-reduce': 32}
    """
    computations, entry = _computations(text)
    found = Traffic(Counter(), Counter(), Counter(), Counter())
    chains = set()  # libtpu writes one operation three times: where it starts, what runs beside it, where it ends

    def walk(name: str, times: int, open_loop: bool) -> None:
        for line in computations.get(name, ()):
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            word = operation.group(1)
            kind = next((kind for kind in KINDS if word in (kind, f"{kind}-start")), None)
            if kind is not None:
                chain = _CHAIN.search(line)
                if chain and chain.group(1) in chains:
                    continue
                if chain:
                    chains.add(chain.group(1))
                size = _result_bytes(line[: operation.start(1)], kind, word.endswith("-start"))
                calls, sizes = (found.open_calls, found.open_bytes) if open_loop else (found.calls, found.bytes)
                calls[kind] += times
                sizes[kind] += times * size
                continue
            trips, unknown = 1, False
            if word == "while":
                known = _trips(line, computations)
                trips, unknown = (1, True) if known is None else (known, False)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for other in called:
                walk(other, times * trips, open_loop or unknown)

    walk(entry, 1, False)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as noted, or the one number that its condition compares a counter with."""
    noted = _TRIPS.search(line)
    if noted:
        return int(noted.group(1))
    condition = computations.get(_CONDITION.search(line).group(1), [])
    counts = [int(found.group(1)) for found in map(_COUNT.match, condition) if found]
    return counts[0] if len(counts) == 1 else None


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, lines = {}, "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif lines is not None and (instruction := _INSTRUCTION.match(line)):
            lines.append(instruction.group(1))
    return computations, entry


def _result_bytes(shapes: str, kind: str, starts: bool) -> int:
    sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(shapes)]
    if starts and kind in ("all-gather", "collective-permute", "all-to-all"):
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]  # operands come first
    return sum(sizes)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype).group())
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8
