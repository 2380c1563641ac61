import numpy as np
import pytest

from experiments.data.cifar_binary import load_cifar10, load_cifar100, read_cifar
from experiments.data.pipeline import training_batches


def records(count, labels=1, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), np.uint8)
    return np.concatenate([rng.integers(0, classes, (count, labels), np.uint8), pixels], axis=1)


@pytest.fixture
def cifar10(tmp_path):
    for number in range(1, 6):
        records(3, seed=number).tofile(tmp_path / f"data_batch_{number}.bin")
    records(4, seed=9).tofile(tmp_path / "test_batch.bin")
    return tmp_path


def test_planes_become_channels(tmp_path):
    record = np.zeros(3073, np.uint8)
    record[0] = 7
    record[1 + 0 * 1024 + 5 * 32 + 2] = 255  # red at row 5, column 2
    record[1 + 1 * 1024 + 31 * 32 + 31] = 51  # green in the last corner
    record[1 + 2 * 1024] = 102  # blue in the first
    record.tofile(tmp_path / "one.bin")
    source = read_cifar([tmp_path / "one.bin"], label_classes=(10,))
    expected = np.zeros((32, 32, 3), np.float32)
    expected[5, 2, 0], expected[31, 31, 1], expected[0, 0, 2] = 1.0, 0.2, 0.4
    assert source[0]["label"] == 7
    np.testing.assert_array_equal(source[0]["image"], expected)


def test_cifar10_folder(cifar10):
    train, heldout = load_cifar10(cifar10)
    assert (len(train), len(heldout), train.classes) == (15, 4, ())
    expected = np.concatenate([records(3, seed=number)[:, 0] for number in range(1, 6)])
    np.testing.assert_array_equal(train.labels, expected)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (cifar10 / "batches.meta.txt").write_text(names.replace(" ", "\n") + "\n\n")
    assert load_cifar10(cifar10).train.classes == tuple(names.split())
    batch = next(iter(training_batches(train, batch_size=6, seed=0)))
    assert batch["image"].shape == (6, 32, 32, 3)


def test_cifar100_has_two_labels(tmp_path):
    content = records(6, labels=2, classes=20)
    for name in ("train.bin", "test.bin"):
        content.tofile(tmp_path / name)
    np.testing.assert_array_equal(load_cifar100(tmp_path).train.labels, content[:, 1])
    np.testing.assert_array_equal(load_cifar100(tmp_path, coarse=True).train.labels, content[:, 0])
    np.testing.assert_array_equal(load_cifar100(tmp_path).heldout.images[2, 0, :5, 1], content[2, 2 + 1024 : 2 + 1029])


def test_truncated_and_empty_files_are_refused(cifar10):
    path = cifar10 / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: has 9218 bytes, expected a positive multiple of 3073"):
        load_cifar10(cifar10)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: has 0 bytes"):
        load_cifar10(cifar10)


def test_labels_out_of_range_are_refused(cifar10):
    content = records(3)
    content[1, 0] = 10
    content.tofile(cifar10 / "test_batch.bin")
    with pytest.raises(ValueError, match=r"test_batch\.bin: record 1 has label 10 in byte 0, expected 0 to 9"):
        load_cifar10(cifar10)


def test_missing_files_and_wrong_names_are_refused(cifar10):
    (cifar10 / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt: names 2 classes, expected 10"):
        load_cifar10(cifar10)
    (cifar10 / "batches.meta.txt").write_bytes("Flugzeug Lastwagen Kröte".encode("latin-1"))
    with pytest.raises(ValueError, match=r"batches\.meta\.txt: is no text, expected the names of the classes"):
        load_cifar10(cifar10)
    with pytest.raises(FileNotFoundError, match=f"{cifar10}: is a folder, expected a file"):
        read_cifar([cifar10], label_classes=(10,))
    (cifar10 / "data_batch_4.bin").rename(cifar10 / "data_batch_4")
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin not there; expected .* binary version, not"):
        load_cifar10(cifar10)
    with pytest.raises(FileNotFoundError, match=r"nowhere: train\.bin, test\.bin not there"):
        load_cifar100(cifar10 / "nowhere")
    with pytest.raises(ValueError, match="paths is empty"):
        read_cifar([], label_classes=(10,))
