import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.data.byte_corpus import ByteWindows, load_byte_corpus


def _files(corpus):
    return corpus.train_files + corpus.heldout_files


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "lib"
    for number in range(60):
        path = root / ("" if number % 2 else "package") / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x = %d\n" % number)
    for skipped in ("site-packages/a.py", "test/b.py", "package/tests/c.py", "_sysconfigdata_here.py", "notes.txt"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_bytes(b"skipped")
    return root


def test_reads_every_file_once_in_order_and_splits_by_file(library):
    corpus = load_byte_corpus(library)
    files = _files(corpus)
    assert sorted(files) == sorted(str(path.relative_to(library)) for path in library.rglob("module*.py"))
    assert list(corpus.train_files) == sorted(corpus.train_files)
    assert corpus.train_files
    assert corpus.heldout_files
    for data, names in ((corpus.train, corpus.train_files), (corpus.heldout, corpus.heldout_files)):
        assert bytes(data) == b"".join((library / name).read_bytes() + b"\0" for name in names)


def test_a_new_file_moves_no_other(library):
    before = load_byte_corpus(library)
    (library / "extra.py").write_bytes(b"y = 1\n")
    after = load_byte_corpus(library)
    assert set(before.train_files) <= set(after.train_files)
    assert set(before.heldout_files) <= set(after.heldout_files)
    assert before.digest != after.digest


def test_limit_takes_whole_files_and_a_larger_one_keeps_them(library):
    small, large = (load_byte_corpus(library, max_bytes=limit, heldout_percent=30) for limit in (150, 300))
    assert len(small.train) + len(small.heldout) <= 150
    assert len(large.train) + len(large.heldout) <= 300
    assert set(small.train_files) < set(large.train_files)
    assert set(small.heldout_files) <= set(large.heldout_files)


def test_tests_are_read_on_request(library):
    assert {"test/b.py", "package/tests/c.py"} <= set(_files(load_byte_corpus(library, include_tests=True)))
    assert not any("site-packages" in name for name in _files(load_byte_corpus(library, include_tests=True)))


def test_the_running_interpreter_has_a_corpus():
    corpus = load_byte_corpus(max_bytes=3_000_000)
    again = load_byte_corpus(sysconfig.get_path("stdlib"), max_bytes=3_000_000)
    assert corpus.digest == again.digest
    assert 2_000_000 < len(corpus.train) + len(corpus.heldout) <= 3_000_000
    assert 0.02 < len(corpus.heldout) / 3_000_000 < 0.3
    assert not set(corpus.train_files) & set(corpus.heldout_files)
    assert len(np.unique(corpus.train)) > 90


def test_missing_zipped_and_empty_libraries_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there, expected a folder"):
        load_byte_corpus(tmp_path / "nowhere")
    archive = tmp_path / "python311.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("abc.py", "x = 1")
    with pytest.raises(FileNotFoundError, match=r"python311.zip is a file, expected a folder.*zip archive.*root"):
        load_byte_corpus(archive)
    (tmp_path / "compiled").mkdir()
    Path(tmp_path, "compiled", "abc.pyc").write_bytes(b"\0")
    with pytest.raises(FileNotFoundError, match=r"compiled has no \.py files"):
        load_byte_corpus(tmp_path / "compiled")


def test_an_empty_part_is_refused(library):
    with pytest.raises(ValueError, match=r"none of 0 \.py files falls into the training part with max_bytes=3"):
        load_byte_corpus(library, max_bytes=3)
    with pytest.raises(ValueError, match="heldout_percent is 100, expected 1 to 99"):
        load_byte_corpus(library, heldout_percent=100)


def test_windows():
    data = np.arange(200, dtype=np.uint8)
    every = ByteWindows(data, 16)
    assert len(every) == 200 - 16
    np.testing.assert_array_equal(every[183]["tokens"], np.arange(183, 200))
    assert every[0]["tokens"].dtype == np.int32
    once = ByteWindows(data, 16, stride=16)
    targets = np.concatenate([once[index]["tokens"][1:] for index in range(len(once))])
    np.testing.assert_array_equal(targets, np.arange(1, 1 + 16 * 12))
    np.testing.assert_array_equal(once.take(np.array([3, 1]))["tokens"][1], once[1]["tokens"])
    assert len(ByteWindows(data[:17], 16)) == 1


def test_wrong_windows_are_refused():
    data = np.arange(16, dtype=np.uint8)
    with pytest.raises(ValueError, match="16 bytes are too few for one window of length 16"):
        ByteWindows(data, 16)
    with pytest.raises(ValueError, match="length is 0 and stride 1"):
        ByteWindows(data, 0)
    with pytest.raises(ValueError, match="dtype int64, expected"):
        ByteWindows(data.astype(np.int64), 4)
    with pytest.raises(IndexError, match="window 12, expected 0 to 11"):
        ByteWindows(data, 4)[12]
