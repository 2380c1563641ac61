"""What every loader gives: records that can be read in any order, and a held-out part kept away from training.

A source is anything with `__len__` and `__getitem__(index) -> {name: array}`. One that can read many records at once
also has `take(indices) -> {name: array with a leading axis}`, which `experiments.data.pipeline` prefers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Source(Protocol):
    """Random access to records; an optional `take(indices)` reads a whole batch at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Split(NamedTuple):
    """The records to train on and the records held out for evaluation."""

    train: Source
    heldout: Source


@dataclasses.dataclass(frozen=True, eq=False)
class ImageArrays:
    """Labelled images that fit in memory.

    Records are `{"image": float32 (height, width, channels), "label": int32 ()}`. Images stored as uint8 stay so in
    memory and come out divided by 255, in [0, 1]; float32 images come out as they are.

    Args:
        images: uint8 or float32, shape (records, height, width, channels).
        labels: integers from 0 to 2**31 - 1, shape (records,).
        classes: names of the classes, label 0 first; empty when nobody named them.
        origin: where the arrays come from, for error messages.

    Raises:
        ValueError: shapes, dtypes or labels differ from these, or the counts of images and labels differ.

    Example:
        >>> source = ImageArrays(np.full((3, 2, 2, 1), 255, np.uint8), np.arange(3))
        >>> len(source), source[2]["label"], float(source[2]["image"].max())
        (3, np.int32(2), 1.0)
        >>> source.take(np.array([0, 2]))["image"].shape
        (2, 2, 2, 1)
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()
    origin: str = "images"

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"{self.origin}: images have shape {images.shape} and dtype {images.dtype}, expected "
                "(records, height, width, channels) of uint8 or float32"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.origin}: labels have shape {labels.shape} and dtype {labels.dtype}, "
                "expected (records,) of integers"
            )
        check_labels(labels, self.origin)
        if len(images) != len(labels):
            raise ValueError(f"{self.origin}: {len(images)} images but {len(labels)} labels, expected as many of each")
        if len(images) == 0:
            raise ValueError(f"{self.origin}: no images, expected at least one")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images = self.images[indices]
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(255)
        return {"image": images, "label": self.labels[indices].astype(np.int32)}


def check_labels(labels: np.ndarray, origin: str) -> None:
    """Raises a `ValueError` that names `origin` and the record if an integer label is negative or beyond int32."""
    (wrong,) = np.nonzero((labels < 0) | (labels > np.iinfo(np.int32).max))
    if wrong.size:
        raise ValueError(
            f"{origin}: record {wrong[0]} has label {labels[wrong[0]]}, expected 0 to 2**31 - 1; leave out records "
            "without a label"
        )


def require_file(path: Path) -> None:
    """Raises a `FileNotFoundError` that says whether a path is a folder or not there, if it is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")


def stack_records(records: Sequence[Mapping[str, np.ndarray]], origin: str = "records") -> dict[str, np.ndarray]:
    """Stacks records into one batch.

    Args:
        records: at least one record; all have the same names, and the same shape under each name.
        origin: where the records come from, for error messages.

    Returns:
        `{name: array}` with a leading axis of `len(records)`.

    Raises:
        ValueError: a shape differs from that of the first record.

    Example:
        >>> stack_records([{"label": np.int32(3)}, {"label": np.int32(5)}])
        {'label': array([3, 5], dtype=int32)}
    """
    batch = {}
    for name in records[0]:
        shapes = {np.shape(record[name]) for record in records}
        if len(shapes) > 1:
            raise ValueError(
                f"{origin}: '{name}' has shapes {sorted(shapes)} within one batch, expected one shape; "
                "for images, give the loader a size to bring them to"
            )
        batch[name] = np.stack([record[name] for record in records])
    return batch
