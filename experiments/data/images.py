"""Compressed images (PNG, JPEG, BMP ...) to float32 arrays."""

import io
import numbers
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MODES = {1: "L", 3: "RGB"}


def check_image_options(size: tuple[int, int] | None, channels: int) -> None:
    """Refuses a wrong `size` or `channels` when a loader is made, before the first image is read."""
    if channels not in tuple(_MODES):
        raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (colour)")
    pair = isinstance(size, Sequence) and len(size) == 2
    if size is not None and not (pair and all(isinstance(side, numbers.Integral) and side >= 1 for side in size)):
        square = f"; for squares give size=({size}, {size})" if isinstance(size, numbers.Integral) else ""
        raise ValueError(f"size is {size!r}, expected (height, width), both positive whole numbers{square}")


def decode_image(content: bytes | Path, name: str, *, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """Decodes one image.

    Args:
        content: the bytes of a file, or its path.
        name: what to call the image in an error message.
        size: (height, width) to bring it to: cut to that aspect ratio around the centre, then resampled with
            antialiased bilinear interpolation. None leaves it as it is.
        channels: 3 for colour or 1 for grey. Transparency is dropped; the orientation that a camera noted is applied.

    Returns:
        float32 (height, width, channels) in [0, 1].

    Raises:
        ValueError: the image is corrupt, truncated, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    # Each format's decoder has its own way to say that a file is broken.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{name}: not a readable image, corrupt or truncated ({error})") from error
    if image.mode[0] in "IF":
        raise ValueError(
            f"{name}: has pixels of mode {image.mode}, expected 8 bits a channel; "
            "converting would cut off the bright ones, so convert the file first"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the only conversion that Pillow does without a warning for every palette
    image = image.convert(_MODES[channels])
    if size is not None and image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], method=Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return pixels.reshape(image.height, image.width, channels)
