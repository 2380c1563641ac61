import numpy as np
import sklearn.datasets
import sklearn.model_selection

from experiments.data.digits import load_digits


def test_sizes_dtypes_and_range():
    train, heldout = load_digits()
    assert (len(train), len(heldout)) == (1200, 597)
    for part in (train, heldout):
        assert part.images.shape[1:] == (8, 8, 1)
        assert (part.images.dtype, part.labels.dtype) == (np.float32, np.int32)
        assert part.images.min() == np.float32(-0.3)
        assert part.images.max() == np.float32(0.7)
    assert abs(train.images.mean()) < 0.01


def test_split_covers_every_image_once_and_is_stratified():
    train, heldout = load_digits(offset=0)
    both = np.concatenate([train.images, heldout.images]).reshape(1797, 64)
    reference = sklearn.datasets.load_digits().data / 16
    order = np.lexsort(both.T)
    np.testing.assert_array_equal(both[order], reference[np.lexsort(reference.T)].astype(np.float32))
    shares = np.bincount(train.labels) / 1200 - np.bincount(heldout.labels) / 597
    assert np.abs(shares).max() < 0.002


def test_split_is_fixed():
    labels = sklearn.datasets.load_digits().target
    _, expected = sklearn.model_selection.train_test_split(labels, test_size=597, random_state=0, stratify=labels)
    np.testing.assert_array_equal(load_digits().heldout.labels, expected)
    np.testing.assert_array_equal(load_digits(offset=0).heldout.labels, expected)
