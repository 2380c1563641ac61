"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the library, so nothing is downloaded."""

import functools

import numpy as np

from experiments.data.sources import ImageArrays, Split

HELDOUT = 597


@functools.cache
def load_digits(*, offset: float = 0.3) -> Split:
    """Loads the digits with a fixed stratified split: 1,200 to train on, 597 held out.

    Pixels are counts 0 to 16. They are divided by 16, and `offset`, about the mean of the training pixels (0.305), is
    subtracted: a constant, so that nothing about the held-out images leaks into training. `offset=0` gives images
    in [0, 1]. The split never depends on the seed of a run, so all runs are measured on the same 597 images.

    Args:
        offset: what is subtracted from the pixels in [0, 1].

    Returns:
        `Split(train, heldout)` of `ImageArrays`: images float32 (8, 8, 1), labels int32 from 0 to 9.

    Example:
        >>> train, heldout = load_digits()
        >>> len(train), len(heldout), train[0]["image"].shape
        (1200, 597, (8, 8, 1))

    References:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
        (scikit-learn ships its test part).
    """
    # Imported here: scikit-learn takes a second to import, and most commands never need it.
    from sklearn.datasets import load_digits as read
    from sklearn.model_selection import train_test_split

    pixels, labels = read(return_X_y=True)
    images = (pixels / 16 - offset).astype(np.float32).reshape(-1, 8, 8, 1)
    classes = tuple(str(digit) for digit in range(10))
    parts = train_test_split(images, labels.astype(np.int32), test_size=HELDOUT, random_state=0, stratify=labels)
    train_images, heldout_images, train_labels, heldout_labels = parts
    return Split(
        ImageArrays(train_images, train_labels, classes, "digits"),
        ImageArrays(heldout_images, heldout_labels, classes, "digits"),
    )
