"""Random changes of images that training repeats exactly: each follows from one random word per record."""

from collections.abc import Callable

import numpy as np


def random_shift(pixels: int, *, fill: float = 0.0) -> Callable[[dict, np.ndarray], dict]:
    """Moves every image by up to `pixels` in both directions; what comes in from outside is `fill`.

    Args:
        pixels: the largest distance, at least 1; each of the (2 * pixels + 1)**2 shifts is equally likely.
        fill: the value of the background, such as -0.3 for `load_digits(offset=0.3)`.

    Returns:
        `augment(batch, bits) -> batch` for `training_batches`; it changes `batch["image"]`, (rows, height, width,
        channels), and keeps its dtype.

    Raises:
        ValueError: `pixels` is less than 1.

    Example:
        >>> batch = {"image": np.ones((1, 2, 2, 1), np.float32)}
        >>> random_shift(1)(batch, np.array([0], np.uint64))["image"][0, :, :, 0]  # one down, one to the right
        array([[0., 0.],
               [0., 1.]], dtype=float32)
    """
    if pixels < 1:
        raise ValueError(f"pixels is {pixels}, expected at least 1; for no shift, give no augmentation")

    def augment(batch: dict, bits: np.ndarray) -> dict:
        images = batch["image"]
        rows, height, width, _ = images.shape
        edge = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
        padded = np.pad(images, edge, constant_values=fill)
        choices = np.uint64(2 * pixels + 1)
        down = (bits % choices).astype(np.int64)[:, None] + np.arange(height)
        right = (bits // choices % choices).astype(np.int64)[:, None] + np.arange(width)
        shifted = padded[np.arange(rows)[:, None, None], down[:, :, None], right[:, None, :]]
        return {**batch, "image": shifted}

    return augment
