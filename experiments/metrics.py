"""The metrics of a run: JSON lines that survive a kill and that a resumed run continues without a repetition."""

import json
import math
import os
from pathlib import Path


class MetricsLog:
    """Appends records to `metrics.jsonl`; each line is on its way to the disk before `write` returns.

    Args:
        path: the file.
        after: the step of the checkpoint that a run resumes from: later records, and the closing one, are dropped,
            because the run will write them again. None starts an empty file.
        writes: False for processes that keep their records to themselves, since another one writes the file.
    """

    def __init__(self, path: str | Path, *, after: int | None, writes: bool = True):
        self.path = Path(path)
        self.records = [] if after is None else [r for r in read_records(self.path) if r["step"] <= after]
        self.records = [record for record in self.records if record["kind"] != "final"]
        self._file = None
        if not writes:
            return
        # A new file takes the place of the old one at once, so that no kill can leave half of it.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(record) for record in self.records))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")

    def write(self, kind: str, step: int, **fields) -> dict:
        """Appends a record and returns it."""
        record = {"kind": kind, "step": step, **fields}
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()
        return record

    def last(self, kind: str) -> dict | None:
        """The newest record of a kind."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._file is not None:
            self._file.close()


def read_records(path: str | Path) -> list[dict]:
    """The records of a file, without a last line that was cut off; empty where there is no file.

    Raises:
        ValueError: a line is no record; names the file and the line.
    """
    records = []
    lines = Path(path).read_bytes().splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_checked(json.loads(line.decode())))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no record: {error}") from error
    return records


def _line(record: dict) -> str:
    """JSON has no number that is not finite; null stands for it."""
    return json.dumps({name: None if _odd(value) else value for name, value in record.items()}) + "\n"


def _odd(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _checked(record) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise TypeError("it has no kind")
    if not isinstance(record.get("step"), int):
        raise TypeError(f"its step is {record.get('step')!r}")
    if record["kind"] == "masks" and not isinstance(record.get("layers"), dict):
        raise TypeError("its masks have no layers")
    return record
