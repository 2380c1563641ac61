import numpy as np
import pytest

from experiments.data.sources import ImageArrays, stack_records


def test_uint8_images_come_out_in_zero_one_and_float_images_as_they_are():
    pixels = np.arange(2 * 3 * 2 * 1, dtype=np.uint8).reshape(2, 3, 2, 1) * 20
    source = ImageArrays(pixels, np.array([4, 7], np.uint8))
    record = source[1]
    assert record["image"].dtype == np.float32
    assert record["label"].dtype == np.int32
    assert record["label"] == 7
    np.testing.assert_array_equal(record["image"], (pixels[1] / 255).astype(np.float32))

    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 3, 2, 1)
    np.testing.assert_array_equal(ImageArrays(values, np.array([0, 1])).take(np.array([1, 1]))["image"], values[[1, 1]])


def test_a_batch_is_a_copy():
    values = np.zeros((2, 1, 1, 1), np.float32)
    source = ImageArrays(values, np.array([0, 1]))
    source[0]["image"][:] = 5
    source.take(np.array([0]))["image"][:] = 5
    assert values.max() == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2, int), r"here: images have shape \(2, 3, 3\) .* expected"),
        (np.zeros((2, 3, 3, 1)), np.zeros(2, int), "dtype float64, expected"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2), "labels have shape .* dtype float64, expected"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int), "2 images but 3 labels"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([0, -1]), "here: record 1 has label -1, expected 0 to"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([2**31, 0]), "here: record 0 has label 2147483648, expected 0 to"),
        (np.zeros((0, 3, 3, 1), np.uint8), np.zeros(0, int), "no images"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageArrays(images, labels, origin="here")


def test_records_of_different_shapes_do_not_stack():
    records = [{"image": np.zeros((2, 2, 1))}, {"image": np.zeros((3, 2, 1))}]
    with pytest.raises(ValueError, match=r"folder: 'image' has shapes \[\(2, 2, 1\), \(3, 2, 1\)\].*size"):
        stack_records(records, "folder")


def test_text_stacks_too():
    assert stack_records([{"text": "a"}, {"text": "longer"}])["text"].tolist() == ["a", "longer"]
