"""A corpus that every machine has: the source code of Python's own standard library, as bytes, split by file."""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# Python source cannot contain this byte, so it marks where files meet and nothing else.
SEPARATOR = b"\0"
_NEVER = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
# Written by whoever built or installed this interpreter: paths of that machine, not library code.
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True, eq=False)
class ByteCorpus:
    """Bytes to train on and bytes of other files to evaluate on.

    Attributes:
        train: uint8, shape (bytes,).
        heldout: uint8, shape (bytes,).
        train_files: the files in `train`, relative to the root, in the order of their bytes.
        heldout_files: the files in `heldout`.
        digest: hexadecimal SHA-256 of both parts. Another patch release of Python has other sources: record the
            digest with a run, and compare it before the run is resumed or compared with another.
    """

    train: np.ndarray
    heldout: np.ndarray
    train_files: tuple[str, ...]
    heldout_files: tuple[str, ...]
    digest: str


def load_byte_corpus(
    root: str | Path | None = None,
    *,
    max_bytes: int | None = None,
    heldout_percent: int = 10,
    include_tests: bool = False,
) -> ByteCorpus:
    """Reads every .py file under a folder, and keeps some files apart for evaluation.

    A file is held out by a hash of its relative name, so the split is by file, the same on every machine, and adding
    a file moves no other. Files are ordered by relative name; each ends with a zero byte.

    Args:
        root: the folder, by default the standard library of the running interpreter (about 12 MB without its tests).
        max_bytes: the most bytes to read in all, or None for no limit. Whole files are taken, in an order that a hash
            of their names gives, until the next would exceed the limit: a sample of the whole library rather than its
            beginning, and a larger limit keeps what a smaller one took.
        heldout_percent: the share of files that is held out, from 1 to 99.
        include_tests: whether to read folders named test, tests and idle_test too (two and a half times the bytes).

    Returns:
        A `ByteCorpus`.

    Raises:
        FileNotFoundError: the folder does not exist, as where the standard library is a zip archive, or it has no
            .py files, as where only compiled files are installed.
        ValueError: `heldout_percent` is out of range, or one of the two parts would be empty.

    Example:
        >>> corpus = load_byte_corpus(max_bytes=2_000_000)
        >>> bytes(corpus.train[-1:]), corpus.train.dtype, len(corpus.train) + len(corpus.heldout) <= 2_000_000
        (b'\\x00', dtype('uint8'), True)
    """
    if not 1 <= heldout_percent <= 99:
        raise ValueError(f"heldout_percent is {heldout_percent}, expected 1 to 99")
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    names = _limited(root, _source_files(root, include_tests), max_bytes)
    parts = {
        held: [name for name in names if (_hashes(name)[0] % 100 < heldout_percent) == held] for held in (False, True)
    }
    for held, part in parts.items():
        if not part:
            raise ValueError(
                f"{root}: none of {len(names)} .py files falls into the {'held-out' if held else 'training'} part with "
                f"max_bytes={max_bytes} and heldout_percent={heldout_percent}; raise max_bytes or give a larger folder"
            )
    train, heldout = (b"".join((root / name).read_bytes() + SEPARATOR for name in part) for part in parts.values())
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(heldout).digest()).hexdigest()
    return ByteCorpus(
        np.frombuffer(train, np.uint8),
        np.frombuffer(heldout, np.uint8),
        tuple(parts[False]),
        tuple(parts[True]),
        digest,
    )


def _source_files(root: Path, include_tests: bool) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is {'a file' if root.exists() else 'not there'}, expected a folder of .py files. This interpreter "
            "may keep its standard library in a zip archive: give a folder of Python sources as root"
        )
    skipped = _NEVER if include_tests else _NEVER | _TESTS
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    names = sorted(name for name in names if not name.startswith(_MACHINE_FILES))
    if not names:
        raise FileNotFoundError(
            f"{root} has no .py files, expected Python sources. Where only compiled files are installed, install the "
            "sources or give another folder as root"
        )
    return names


def _limited(root: Path, names: list[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return names
    taken, total = [], 0
    for name in sorted(names, key=lambda name: _hashes(name)[1]):
        total += (root / name).stat().st_size + len(SEPARATOR)
        if total > max_bytes:
            break
        taken.append(name)
    return sorted(taken)


def _hashes(name: str) -> tuple[int, int]:
    """Two independent numbers from a name: one decides the part, the other the order in which a limit takes files."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def join_texts(texts: Iterable[str]) -> np.ndarray:
    """Texts as one run of bytes, such as a text column of Parquet files, to take `ByteWindows` of.

    Args:
        texts: any strings; each is encoded as UTF-8 and ends with a zero byte.

    Returns:
        uint8 (bytes,).

    Example:
        >>> bytes(join_texts(["one", "two"]))
        b'one\\x00two\\x00'
    """
    return np.frombuffer(b"".join(text.encode() + SEPARATOR for text in texts), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class ByteWindows:
    """Windows of `length + 1` bytes: `length` inputs, and the same shifted by one as targets.

    Record i is `{"tokens": int32 (length + 1,)}`, the bytes from `i * stride` on.

    Args:
        data: uint8, shape (bytes,).
        length: inputs in a window.
        stride: distance between the starts of windows: 1 makes every position a start (to train on random windows),
            `length` predicts each byte once (to evaluate).

    Raises:
        ValueError: `length` or `stride` is not positive, or `data` is not long enough for one window.

    Example:
        >>> windows = ByteWindows(np.frombuffer(b"abcdefg", np.uint8), 2, stride=2)
        >>> [bytes(window["tokens"].astype(np.uint8)) for window in windows]
        [b'abc', b'cde', b'efg']
    """

    data: np.ndarray
    length: int
    stride: int = 1

    def __post_init__(self):
        if self.data.ndim != 1 or self.data.dtype != np.uint8:
            raise ValueError(
                f"data has shape {self.data.shape} and dtype {self.data.dtype}, expected (bytes,) of uint8"
            )
        if self.length < 1 or self.stride < 1:
            raise ValueError(f"length is {self.length} and stride {self.stride}, expected both to be at least 1")
        if len(self.data) <= self.length:
            raise ValueError(
                f"{len(self.data)} bytes are too few for one window of length {self.length}, expected more than "
                f"{self.length}: read more data or shorten the window"
            )

    def __len__(self) -> int:
        return (len(self.data) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index}, expected 0 to {len(self) - 1}")
        return {"tokens": self.take(np.array([index]))["tokens"][0]}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        offsets = np.asarray(indices)[:, None] * self.stride + np.arange(self.length + 1)
        return {"tokens": self.data[offsets].astype(np.int32)}
