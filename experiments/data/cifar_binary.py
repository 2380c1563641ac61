"""CIFAR-10 and CIFAR-100 in their binary version: records of one or two labels and three planes of 1,024 bytes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.sources import ImageArrays, Split, require_file

_PIXELS = 3 * 32 * 32


def read_cifar(paths: Sequence[str | Path], *, label_classes: Sequence[int], label: int = 0) -> ImageArrays:
    """Reads binary batches, one after another.

    Args:
        paths: the files, at least one.
        label_classes: how many classes each label byte of a record has: (10,) for CIFAR-10, (20, 100) for CIFAR-100.
        label: which of the label bytes to give.

    Returns:
        `ImageArrays` of images in [0, 1], float32 (32, 32, 3), and int32 labels.

    Raises:
        FileNotFoundError: a file is not there, or is a folder.
        ValueError: no files, a file that is empty or does not end with a whole record, or a label out of range.

    References:
        A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the dataset's page describes the
        binary version.
    """
    if not paths:
        raise ValueError("paths is empty, expected at least one file")
    width = len(label_classes) + _PIXELS
    records = np.concatenate([_read_records(Path(path), width, label_classes) for path in paths])
    images = records[:, len(label_classes) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ImageArrays(np.ascontiguousarray(images), records[:, label], origin=str(paths[0]))


def _read_records(path: Path, width: int, label_classes: Sequence[int]) -> np.ndarray:
    require_file(path)
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % width:
        raise ValueError(
            f"{path}: has {content.size} bytes, expected a positive multiple of {width} ({len(label_classes)} for the "
            f"labels and {_PIXELS} for the pixels of each image): truncated, or not the binary version"
        )
    records = content.reshape(-1, width)
    for place, classes in enumerate(label_classes):
        (wrong,) = np.nonzero(records[:, place] >= classes)
        if wrong.size:
            raise ValueError(
                f"{path}: record {wrong[0]} has label {records[wrong[0], place]} in byte {place}, "
                f"expected 0 to {classes - 1}: not the binary version of this dataset"
            )
    return records


def load_cifar10(folder: str | Path) -> Split:
    """Loads `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.

    Args:
        folder: where they lie, as the archive `cifar-10-binary.tar.gz` unpacks them.

    Returns:
        `Split(train, heldout)`; the held-out part is the official test set. Classes are named where
        `batches.meta.txt` is there.

    Raises:
        FileNotFoundError: the folder, or one of the files, is not there.
        ValueError: a file is broken.
    """
    train = [f"data_batch_{number}.bin" for number in range(1, 6)]
    return _load(Path(folder), train, ["test_batch.bin"], "batches.meta.txt", (10,), 0)


def load_cifar100(folder: str | Path, *, coarse: bool = False) -> Split:
    """Loads `train.bin` and `test.bin`.

    Args:
        folder: where they lie, as the archive `cifar-100-binary.tar.gz` unpacks them.
        coarse: whether to give the 20 superclasses rather than the 100 classes.

    Returns:
        `Split(train, heldout)`; the held-out part is the official test set. Classes are named where
        `fine_label_names.txt` or `coarse_label_names.txt` is there.

    Raises:
        FileNotFoundError: the folder, or one of the files, is not there.
        ValueError: a file is broken.
    """
    names = f"{'coarse' if coarse else 'fine'}_label_names.txt"
    return _load(Path(folder), ["train.bin"], ["test.bin"], names, (20, 100), 0 if coarse else 1)


def _load(
    folder: Path, train: list[str], heldout: list[str], names: str, label_classes: tuple[int, ...], label: int
) -> Split:
    missing = [name for name in train + heldout if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing)} not there; expected the files of the binary version, "
            "not those with Python pickles"
        )
    classes = ()
    if (folder / names).is_file():
        try:
            classes = tuple((folder / names).read_text("utf-8").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / names}: is no text, expected the names of the classes ({error})") from error
        if len(classes) != label_classes[label]:
            raise ValueError(f"{folder / names}: names {len(classes)} classes, expected {label_classes[label]}")
    parts = [
        read_cifar([folder / name for name in part], label_classes=label_classes, label=label)
        for part in (train, heldout)
    ]
    return Split(*(ImageArrays(part.images, part.labels, classes, part.origin) for part in parts))
