import re

import numpy as np
import pytest
from PIL import Image

from experiments.data.image_folder import ImageFolder
from experiments.data.pipeline import evaluation_batches, training_batches


def save(path, value, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def flowers(tmp_path):
    root = tmp_path / "flowers"
    save(root / "tulip" / "b.png", 40)
    save(root / "tulip" / "a.JPG", 80)
    save(root / "aster" / "deep" / "c.bmp", 120)
    save(root / "aster" / "d.jpeg", 160)
    save(root / "10" / "e.png", 200)
    save(root / ".cache" / "x.png", 0)
    (root / "aster" / "notes.txt").write_text("not an image")
    return root


def test_order_labels_and_pixels(flowers):
    source = ImageFolder(flowers, size=(4, 4), channels=1)
    assert source.classes == ("10", "aster", "tulip")
    assert [path.name for path in source.paths] == ["e.png", "d.jpeg", "c.bmp", "a.JPG", "b.png"]
    assert [int(source[index]["label"]) for index in range(len(source))] == [0, 1, 1, 2, 2]
    for index, value in enumerate([200, 160, 120, 80, 40]):
        record = source[index]
        assert (record["image"].shape, record["image"].dtype) == ((4, 4, 1), np.float32)
        np.testing.assert_allclose(record["image"] * 255, value, atol=1.5)
        assert record["label"].dtype == np.int32


def test_images_stay_as_they_are_without_a_size(flowers):
    assert ImageFolder(flowers, size=None)[0]["image"].shape == (4, 6, 3)


@pytest.mark.parametrize("threads", [0, 3])
def test_batches(flowers, threads):
    source = ImageFolder(flowers, size=(8, 8))
    batches = iter(training_batches(source, batch_size=10, seed=0, threads=threads))
    for _ in range(3):
        batch = next(batches)
        assert batch["image"].shape == (10, 8, 8, 3)
        assert sorted(batch["label"].tolist()) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    (batch,) = evaluation_batches(source, batch_size=6, threads=threads)
    np.testing.assert_array_equal(batch["label"], [0, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(batch["weight"], [1, 1, 1, 1, 1, 0])


def test_classes_of_training_hold_for_validation(flowers, tmp_path):
    save(tmp_path / "validation" / "tulip" / "v.png", 10)
    source = ImageFolder(tmp_path / "validation", size=(4, 4), classes=ImageFolder(flowers, size=(4, 4)).classes)
    assert source[0]["label"] == 2
    save(tmp_path / "validation" / "weed" / "v.png", 10)
    with pytest.raises(
        ValueError, match=r"subfolders \['weed'\] that are none of the classes \['10', 'aster', 'tulip'\]"
    ):
        ImageFolder(tmp_path / "validation", size=(4, 4), classes=source.classes)


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere", size=(4, 4))
    save(tmp_path / "flat" / "a.png", 1)
    with pytest.raises(FileNotFoundError, match="flat has no subfolders, expected one for each class"):
        ImageFolder(tmp_path / "flat", size=(4, 4))
    (tmp_path / "flat" / "empty").mkdir()
    (tmp_path / "flat" / "empty" / "a.tiff").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"empty has no images, expected files ending in \.png, \.jpg"):
        ImageFolder(tmp_path / "flat", size=(4, 4))


def test_corrupt_and_vanished_images_are_named(flowers):
    source = ImageFolder(flowers, size=(4, 4))
    path = source.paths[4]
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"tulip/b\.png: not a readable image, corrupt or truncated"):
        source[4]
    with pytest.raises(ValueError, match=r"tulip/b\.png: not a readable image"):
        next(iter(training_batches(source, batch_size=5, seed=0, threads=2)))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        source[4]


def test_wrong_options_are_refused(flowers):
    with pytest.raises(ValueError, match=r"channels is 4, expected 1 \(grey\) or 3"):
        ImageFolder(flowers, size=(4, 4), channels=4)
    with pytest.raises(ValueError, match=r"channels is \[3\], expected 1"):
        ImageFolder(flowers, size=(4, 4), channels=[3])
    for size in ((0, 4), (4,), (4.0, 4), "32"):
        with pytest.raises(ValueError, match=rf"size is {re.escape(repr(size))}, expected \(height, width\)"):
            ImageFolder(flowers, size=size)
    with pytest.raises(ValueError, match=r"size is 32, expected .*; for squares give size=\(32, 32\)"):
        ImageFolder(flowers, size=32)
