"""Building C++ at first use: the cache and its key, the lock, and what is said where it cannot be done."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from pallas_kernels import native

TRIVIAL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PALLAS_KERNELS_NATIVE", raising=False)
    path = tmp_path / "kernel" / "answer.cc"
    path.parent.mkdir()
    path.write_text(TRIVIAL)
    return path


def _build(source, results):
    results.put(str(native.build(Path(source))))


def test_builds_once_and_keys_by_content(source, monkeypatch):
    path = native.build(source)
    stamp = path.stat().st_mtime_ns
    assert native.build(source) == path
    assert path.stat().st_mtime_ns == stamp
    source.write_text(TRIVIAL.replace("42", "43"))
    assert native.build(source) != path
    source.write_text(TRIVIAL)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert native.library_path(source)[0] != path
    monkeypatch.undo()
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(path.parent))
    monkeypatch.setattr(native, "cpu_features", lambda: "another machine")
    assert native.library_path(source)[0] != path


def test_many_processes_build_one_library(source):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_build, args=(str(source), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    names = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(names) == 1
    folder = Path(names.pop()).parent
    assert len(list(folder.glob("*.so"))) == 1


def test_compiler_errors_are_shown_and_remembered(source, monkeypatch):
    source.write_text("this is no C++\n")
    reason = native.unavailable(source, ())
    assert "the compiler failed" in reason
    assert "error" in reason
    assert str(source) in reason
    monkeypatch.setattr(native, "build", None)
    assert native.unavailable(source, ()) == reason


def test_no_compiler_is_a_clear_reason(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler was found" in native.unavailable(source, ())
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert "CXX='no-such-compiler -m64' was not found" in native.unavailable(source, ())


def test_native_kernels_can_be_turned_off(source, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", "0")
    assert "PALLAS_KERNELS_NATIVE=0" in native.unavailable(source, ())


def test_cache_that_cannot_be_written(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALLAS_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert "name another folder in PALLAS_KERNELS_CACHE" in native.unavailable(source, ())


def test_damaged_library_is_built_again(source):
    path = native.build(source)
    path.write_bytes(b"not a library")
    native.register(source, ())
    assert path.stat().st_size > 1000


def test_default_folder_follows_the_desktop_convention(monkeypatch, tmp_path):
    monkeypatch.delenv("PALLAS_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "pallas_kernels"


def test_a_compiler_is_there_or_the_reason_is():
    if any(map(shutil.which, ("g++", "clang++", "c++"))):
        assert native.find_compiler()
    else:
        with pytest.raises(native.NativeUnavailable):
            native.find_compiler()
