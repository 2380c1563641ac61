"""IDX files, the format of MNIST, Fashion-MNIST, EMNIST and KMNIST: plain or gzip-compressed, every element type."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.data.sources import ImageArrays, Split, check_labels, require_file

# The third byte of a file says what its elements are; all are big-endian.
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_AXES = {"images": 3, "labels": 1}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one IDX file.

    Args:
        path: the file. Whether it is compressed is seen from its first bytes, whatever its name says.

    Returns:
        An array of the shape and element type that the header gives, in the machine's byte order.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: the file is not IDX, is truncated, has bytes too many or axes too many for an array, or its
            compression is broken.

    References:
        Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section "File formats".
    """
    path = Path(path)
    require_file(path)
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            shape, dtype = _read_header(file, path)
            expected = math.prod(shape) * dtype.itemsize
            # One byte more than expected tells whether the file goes on, without reading all of a wrong one.
            content = _read_up_to(file, expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip compression is broken or cut short ({error})") from error
    if len(content) != expected:
        found = f"only {len(content)}" if len(content) < expected else "more"
        raise ValueError(
            f"{path}: the header announces shape {shape} of {dtype.name}, {expected} bytes after the header, "
            f"but there are {found}"
        )
    try:
        return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"{path}: the header announces shape {shape}, which no array can have ({error})") from error


def _read_header(file, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] == 0:
        codes = ", ".join(f"{code:#04x}" for code in _DTYPES)
        raise ValueError(
            f"{path}: starts with bytes {magic.hex(' ') or '(none)'}, expected the IDX header 00 00, an element type "
            f"({codes}), and a number of axes of at least 1"
        )
    axes = magic[3]
    sizes = file.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise ValueError(
            f"{path}: the header ends after {len(sizes)} bytes of sizes, expected {4 * axes} for {axes} axes"
        )
    return struct.unpack(f">{axes}I", sizes), np.dtype(_DTYPES[magic[2]])


def _read_up_to(file, count: int) -> bytearray:
    """Reads in pieces: one large read would reserve whatever size a broken header announces."""
    content = bytearray()
    while piece := file.read(min(count - len(content), 1 << 20)):
        content += piece
    return content


def load_idx(images: str | Path, labels: str | Path) -> ImageArrays:
    """Loads a file of images and the file of their labels.

    Args:
        images: an IDX file of unsigned bytes, (records, height, width) or (records, height, width, channels).
        labels: an IDX file of integers from 0, (records,).

    Returns:
        `ImageArrays` of images in [0, 1], float32 (height, width, channels), and int32 labels.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is broken, or the two do not belong together.
    """
    pixels, targets = read_idx(images), read_idx(labels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"{images}: has shape {pixels.shape} of {pixels.dtype}, expected images as uint8 "
            "(records, height, width) or (records, height, width, channels); is this the file of labels?"
        )
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise ValueError(
            f"{labels}: has shape {targets.shape} of {targets.dtype}, expected labels as integers (records,); "
            "is this the file of images?"
        )
    if len(pixels) != len(targets):
        raise ValueError(f"{images} has {len(pixels)} images but {labels} has {len(targets)} labels, expected as many")
    check_labels(targets, str(labels))
    return ImageArrays(pixels if pixels.ndim == 4 else pixels[..., None], targets, origin=str(images))


def load_idx_folder(folder: str | Path) -> Split:
    """Loads the four files of MNIST and its kin: `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or `.gz`.

    Args:
        folder: where they lie. `test-` for `t10k-` and `images.idx3` for `images-idx3` are known too.

    Returns:
        `Split(train, heldout)`; the held-out part is the official test set.

    Raises:
        FileNotFoundError: the folder, or one of the files, is not there.
        ValueError: a file is broken, or two do not belong together.
    """
    folder = Path(folder)

    def find(parts: tuple[str, ...], what: str) -> Path:
        stems = [f"{part}-{what}{dot}idx{_AXES[what]}-ubyte" for part in parts for dot in "-."]
        names = [stem + ending for stem in stems for ending in ("", ".gz")]
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(f"{folder}: none of the files {', '.join(names)} is there")

    return Split(*(load_idx(find(parts, "images"), find(parts, "labels")) for parts in (("train",), ("t10k", "test"))))
