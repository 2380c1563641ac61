"""C++ kernels behind jax.ffi, compiled at first use by the machine's own compiler.

The library is kept in a cache folder under a name made of everything it depends on: source, `cpu.h`, compiler and its
version, flags, the FFI headers of the installed jaxlib, and the CPU's features. It is built under a lock and renamed
into place, so many processes may start at once. Nothing is built where no compiler is found; callers then have a reason
to show.

Environment variables:
    CXX: the compiler. Default: the first of g++, clang++ and c++ on the path.
    PALLAS_KERNELS_CACHE: the cache folder. Default: pallas_kernels in $XDG_CACHE_HOME or ~/.cache.
    PALLAS_KERNELS_NATIVE: 0 turns native kernels off.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-pthread")

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class NativeUnavailable(RuntimeError):
    """No native kernel on this machine; the message says why and what helps."""


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    named = os.environ.get("PALLAS_KERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pallas_kernels"


def find_compiler() -> list[str]:
    """The compiler command.

    Raises:
        NativeUnavailable: if it is turned off or there is none.
    """
    if os.environ.get("PALLAS_KERNELS_NATIVE") == "0":
        raise NativeUnavailable("native kernels are turned off by PALLAS_KERNELS_NATIVE=0")
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise NativeUnavailable(f"the C++ compiler of CXX={named!r} was not found; correct CXX or unset it")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise NativeUnavailable("no C++ compiler was found (g++, clang++, c++); install one or name it in CXX")


def cpu_features() -> str:
    """A text that differs between CPUs that need different code."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + " " + " ".join(sorted(line.partition(":")[2].split()))
    return platform.machine() + " " + platform.processor() + " " + platform.node()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shown = done.stderr.strip() or done.stdout.strip()
        raise NativeUnavailable(f"the compiler failed:\n{shlex.join(command)}\n{shown}")
    return done.stdout


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"])


def library_path(source: Path) -> tuple[Path, list[str]]:
    """The name that the compiled `source` has in the cache, and the command that makes it, without `-o`.

    Raises:
        NativeUnavailable: if there is no compiler.
    """
    compiler = find_compiler()
    headers = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api"
    digest = hashlib.sha256()
    shared = Path(__file__).with_name("cpu.h")
    parts = [source.read_bytes(), shared.read_bytes(), *(x.read_bytes() for x in sorted(headers.glob("*.h")))]
    parts += [x.encode() for x in (*compiler, _version(tuple(compiler)), *FLAGS, cpu_features())]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    path = cache_folder() / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:24]}.so"
    return path, [*compiler, *FLAGS, "-I", jax.ffi.include_dir(), "-I", str(shared.parent), str(source)]


@contextlib.contextmanager
def _locked(path: Path):
    """Holds an exclusive lock on a file between processes, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: concurrent builds then only cost time, since the rename is atomic.
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Path) -> Path:
    """Compiles `source` unless the cache has it.

    Args:
        source: a C++ file; it may include the FFI headers of jaxlib, `cpu.h`, and nothing else that changes.

    Returns:
        The path of the shared library.

    Raises:
        NativeUnavailable: without compiler, if the compiler fails (its message is shown), or if the cache cannot be
        written.
    """
    path, command = library_path(source)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _log.info("compiling %s, once for this machine", source.name)
                handle, name = tempfile.mkstemp(suffix=".so", prefix=path.stem + "-", dir=path.parent)
                os.close(handle)
                try:
                    _run([*command, "-o", name])
                    os.replace(name, path)
                finally:
                    Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise NativeUnavailable(
            f"cannot write to {path.parent} ({error}); name another folder in PALLAS_KERNELS_CACHE"
        ) from error
    return path


_loaded: dict[Path, ctypes.CDLL] = {}
_failed: dict[tuple[Path, str | None, str | None], str] = {}


def register(source: Path, targets: tuple[str, ...]) -> None:
    """Builds and loads `source` once per process and registers its handlers as FFI targets for the CPU.

    Args:
        source: the C++ file.
        targets: names of handler symbols, which become the names of the targets.

    Raises:
        NativeUnavailable: as `build`; a failure is remembered, so the compiler is not run again for each call.
    """
    if os.environ.get("PALLAS_KERNELS_NATIVE") == "0":
        find_compiler()
    key = (source, os.environ.get("CXX"), os.environ.get("PALLAS_KERNELS_CACHE"))
    with _lock:
        if source in _loaded:
            return
        if key in _failed:
            raise NativeUnavailable(_failed[key])
        try:
            library = _load(source)
        except (NativeUnavailable, OSError) as error:
            _failed[key] = str(error)
            raise NativeUnavailable(_failed[key]) from error
        for name in targets:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        _loaded[source] = library


def _load(source: Path) -> ctypes.CDLL:
    path = build(source)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A damaged file: make it again.
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(build(source)))


def unavailable(source: Path, targets: tuple[str, ...]) -> str | None:
    """None if the kernels of `source` are ready to be called, else the reason why not. Builds them if need be."""
    try:
        register(source, targets)
    except NativeUnavailable as error:
        return str(error)
    return None
