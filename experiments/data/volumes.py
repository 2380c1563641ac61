"""Synthetic volumes with organs: bright and dark bodies in noise, and a target that only its neighbours give away."""

from typing import NamedTuple

import numpy as np

ORGANS = ("bladder", "rectum", "uterus")


class Volumes(NamedTuple):
    """What `make_volumes` gives.

    Attributes:
        images: float32 (volumes, side, side, side, 1).
        organs: int32 (volumes, side, side, side), 0 or 1 + the number in `ORGANS`.
        target: bool, likewise: a region around the lower end of the uterus that looks like what surrounds it.
    """

    images: np.ndarray
    organs: np.ndarray
    target: np.ndarray


def make_volumes(count: int, *, side: int = 16, noise: float = 0.35, seed: int = 0) -> Volumes:
    """Makes volumes; the same seed gives the same ones.

    Args:
        count: volumes.
        side: voxels along each axis.
        noise: deviation of the noise, which is smooth in part; organs differ from what surrounds them by about 1.
        seed: of all that is random.

    Returns:
        Images with organs and target.

    Example:
        >>> volumes = make_volumes(2)
        >>> volumes.images.shape, sorted(set(volumes.organs.ravel().tolist())), bool(volumes.target.any())
        ((2, 16, 16, 16, 1), [0, 1, 2, 3], True)
    """
    random = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[(np.arange(side) + 0.5) / side] * 3, indexing="ij"), axis=-1)

    def body(centre, radii):
        return np.sum(((at - centre) / radii) ** 2, axis=-1) < 1

    images = np.zeros((count, side, side, side), np.float32)
    organs = np.zeros(images.shape, np.int32)
    target = np.zeros(images.shape, bool)
    for image, organ, wanted in zip(images, organs, target, strict=True):
        shift = random.uniform(-0.08, 0.08, 3)
        # Axes: up, to the back, to the side.
        uterus = np.array([0.62, 0.5, 0.5]) + shift
        bladder = uterus - np.array([0.3, 0.24, 0]) + random.normal(0, 0.02, 3)
        rectum = uterus + np.array([-0.2, 0.3, 0]) + random.normal(0, 0.02, 3)
        for number, (centre, radii, brightness) in enumerate(
            [
                (bladder, random.uniform(0.13, 0.2, 3), -1.0),
                (rectum, np.array([0.45, 0.09, 0.1]) * random.uniform(0.9, 1.2), 0.9),
                (uterus, np.array([0.2, 0.13, 0.15]) * random.uniform(0.9, 1.2), 0.7),
            ],
            1,
        ):
            inside = body(centre, radii)
            organ[inside] = number
            image[inside] = brightness
        wanted |= body(uterus - np.array([0.17, 0, 0]), np.array([0.16, 0.13, 0.18]))
        coarse = random.normal(0, noise, (side // 4,) * 3)
        image += np.kron(coarse, np.ones((4, 4, 4))) + random.normal(0, noise, image.shape)
    return Volumes(images[..., None], organs, target)
