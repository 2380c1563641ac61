import numpy as np
import pytest

from experiments.data.augment import random_shift
from experiments.data.digits import load_digits
from experiments.data.pipeline import training_batches


def test_every_shift_is_the_moved_image():
    image = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1)
    words = np.arange(9, dtype=np.uint64)
    shifted = random_shift(1, fill=-1.0)({"image": np.tile(image, (9, 1, 1, 1)), "label": words}, words)
    seen = set()
    for result in shifted["image"]:
        matches = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                expected = np.full_like(image, -1)
                for row in range(3):
                    for column in range(4):
                        if 0 <= row - down < 3 and 0 <= column - right < 4:
                            expected[row, column] = image[row - down, column - right]
                if np.array_equal(result, expected):
                    matches.append((down, right))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9
    np.testing.assert_array_equal(shifted["label"], words)


def test_repeats_exactly_and_differs_between_epochs():
    train = load_digits().train

    def first_two():
        batches = iter(training_batches(train, batch_size=len(train), seed=3, augment=random_shift(1, fill=-0.3)))
        return next(batches), next(batches)

    (one, two), (again, _) = first_two(), first_two()
    np.testing.assert_array_equal(one["image"], again["image"])
    totals = [np.sort(batch["image"].sum((1, 2, 3))) for batch in (one, two)]
    assert (totals[0] != totals[1]).any()


def test_no_shift_is_refused():
    with pytest.raises(ValueError, match="pixels is 0, expected at least 1"):
        random_shift(0)
