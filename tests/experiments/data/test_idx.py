import gzip
import struct

import numpy as np
import pytest

from experiments.data.idx import load_idx, load_idx_folder, read_idx
from experiments.data.pipeline import training_batches

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(values):
    header = struct.pack(">BBBB", 0, 0, CODES[values.dtype.name], values.ndim)
    return (
        header
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.astype(values.dtype.newbyteorder(">")).tobytes()
    )


def write(path, values):
    content = idx_bytes(values)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 4, 3), np.uint8), np.array([3, 0, 9, 1, 1], np.uint8)


@pytest.mark.parametrize("name", ["values", "values.gz"])
@pytest.mark.parametrize("dtype", CODES)
def test_every_element_type_reads_back(tmp_path, dtype, name):
    values = np.array([[1, 0, 100], [7, 2, 127]]).astype(dtype)
    if dtype != "uint8":
        values[0, 1] = -5
    result = read_idx(write(tmp_path / name, values))
    np.testing.assert_array_equal(result, values)
    assert result.dtype == values.dtype


def test_bytes_of_the_format_itself(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(b"\0\0\x08\x01\0\0\0\x03\x05\x00\x04")
    assert read_idx(path).tolist() == [5, 0, 4]
    path.write_bytes(b"\0\0\x0b\x02\0\0\0\x01\0\0\0\x02\x01\x00\xff\xff")
    assert read_idx(path).tolist() == [[256, -1]]


def test_compression_is_seen_whatever_the_name_says(tmp_path, digits):
    path = tmp_path / "unpacked.gz"
    path.write_bytes(idx_bytes(digits[0]))
    np.testing.assert_array_equal(read_idx(path), digits[0])


def test_images_and_labels(tmp_path, digits):
    images, labels = digits
    source = load_idx(write(tmp_path / "images.gz", images), write(tmp_path / "labels", labels))
    record = source[2]
    assert (record["image"].dtype, record["image"].shape, record["label"]) == (np.float32, (4, 3, 1), 9)
    np.testing.assert_array_equal(record["image"][..., 0], images[2].astype(np.float32) / np.float32(255))
    batch = next(iter(training_batches(source, batch_size=5, seed=0)))
    assert sorted(batch["label"].tolist()) == sorted(labels.tolist())


def test_folder_of_mnist(tmp_path, digits):
    images, labels = digits
    write(tmp_path / "train-images-idx3-ubyte.gz", images)
    write(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    write(tmp_path / "t10k-images.idx3-ubyte", images[:2])
    with pytest.raises(FileNotFoundError, match="none of the files t10k-labels-idx1-ubyte, t10k-labels"):
        load_idx_folder(tmp_path)
    write(tmp_path / "t10k-labels.idx1-ubyte", labels[:2])
    train, heldout = load_idx_folder(tmp_path)
    assert (len(train), len(heldout)) == (5, 2)
    np.testing.assert_array_equal(heldout.labels, labels[:2])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"announces shape \(5, 4, 3\) of uint8, 60 bytes .* only 59"),
        (lambda content: content + b"\0", "60 bytes after the header, but there are more"),
        (lambda content: content[:7], "header ends after 3 bytes of sizes, expected 12 for 3 axes"),
        (lambda content: content[:2], r"starts with bytes 00 00, expected the IDX header 00 00"),
        (lambda content: b"", r"starts with bytes \(none\), expected"),
        (lambda content: b"\x89PNG" + content, "starts with bytes 89 50 4e 47, expected"),
        (lambda content: b"\0\0\x0a" + content[3:], r"starts with bytes 00 00 0a 03, expected .*0x08, 0x09, 0x0b"),
        (lambda content: b"\0\0\x08\0" + content[4:], "a number of axes of at least 1"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "4294967295.* but there are only 60"),
        (lambda content: b"\0\0\x08\x41" + b"\0\0\0\x01" * 65 + b"\0", r"which no array can have \(.*64"),
        (lambda content: b"\0\0\x08\x04" + b"\0" * 4 + b"\xff" * 12, r"which no array can have \(.*too big"),
    ],
)
def test_broken_files_are_refused(tmp_path, digits, change, message, compress):
    content = change(idx_bytes(digits[0]))
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_broken_compression_is_refused(tmp_path):
    content = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8)))
    damaged = bytearray(content)
    damaged[200] ^= 0xFF
    for broken in (content[: len(content) // 2], content[:-6], content[:2] + b"\xff" + content[3:], bytes(damaged)):
        path = tmp_path / "images.gz"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"images\.gz: the gzip compression is broken or cut short"):
            read_idx(path)


def test_files_that_do_not_belong_together_are_refused(tmp_path, digits):
    images, labels = write(tmp_path / "images", digits[0]), write(tmp_path / "labels", digits[1])
    with pytest.raises(ValueError, match=r"labels: has shape \(5,\) of uint8, expected images .* file of labels\?"):
        load_idx(labels, images)
    with pytest.raises(ValueError, match=r"images: has shape \(5, 4, 3\) of uint8, expected labels"):
        load_idx(images, images)
    fewer = write(tmp_path / "fewer", digits[1][:3])
    with pytest.raises(ValueError, match=r"images has 5 images but .*fewer has 3 labels"):
        load_idx(images, fewer)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_idx(images, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: is a folder, expected a file"):
        load_idx(tmp_path, labels)
    missing = write(tmp_path / "missing", np.array([3, 0, -1, 1, 1], np.int32))
    with pytest.raises(ValueError, match=r"missing: record 2 has label -1, expected 0 to 2\*\*31 - 1"):
        load_idx(images, missing)
