"""What the tests share: a small real corpus, small configs, the command line."""

from __future__ import annotations

import gc
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import hypothesis
import psutil
import pytest
import quick
from kit import TINY, Aurora

# The suite is written for the CPU; with the extra [plan] installed jax would look for a GPU first, and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do. What one worker or an earlier session compiled, nobody compiles again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"aurora-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # as a run on a CPU has it: the keys are alike
# A test compiles programs that run for milliseconds, so that optimising them costs far more than it gains. What is
# claimed of rounding, of the compiler or of speed is tested as a run compiles: those tests are marked `optimized`.
quick.compile_quickly()
# Hypothesis limits an example to 0.2 s by default, which says nothing on a machine that does other work.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# As `aurora_train.cli.main` sets them: tracing makes millions of objects, and with Python's own thresholds the
# collector looks through all of them again and again.
gc.set_threshold(100_000, 20, 100)

# Small modules of the interpreter's own library, alike in every Python we support.
MODULES = ("abc", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "colorsys", "copy", "csv", "dis", "enum",
           "fnmatch", "getopt", "glob", "gzip", "heapq", "hmac")


IN_MEMORY, ROOM_BYTES = Path("/dev/shm"), 4 * 2**30


def pytest_configure(config):
    """Put the folders of the default tier into memory where there is room. A run syncs its files a hundred times, which
    takes a disk a second and keeps no processor busy; no test here cuts the power of the machine it runs on."""
    if "not slow" in config.option.markexpr and os.access(IN_MEMORY, os.W_OK):
        memory = os.statvfs(IN_MEMORY)
        room = min(memory.f_bavail * memory.f_frsize, psutil.virtual_memory().available - 2 * ROOM_BYTES)
        if room > ROOM_BYTES and not memory.f_flag & os.ST_NOEXEC:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


def pytest_collection_modifyitems(items):
    """The folders with the long files first, so that in the end no worker waits for another's."""
    items.sort(key=lambda item: item.path.parent.name not in ("faults", "train"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture of a test: compile as it wants, and leave the objects of other files out of collections."""
    quick.set_optimized(_wants_all_optimizations(item))
    if _files and _files[-1] == item.path:
        return
    _files[:] = [item.path]
    gc.collect()
    gc.freeze()


_files: list[Path] = []


def _wants_all_optimizations(item) -> bool:
    """A test that is marked so, a whole benchmark, and what is compiled for a GPU."""
    for_a_gpu = any("[plan]" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
    return for_a_gpu or any(item.get_closest_marker(name) for name in ("optimized", "release"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of real Python files."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        shutil.copyfile(library / f"{name}.py", folder / f"{name}.py")
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """Prepared data and compiled programs, shared by the tests of one session that do not break them.

    A process started with it compiles nothing that this one, the other worker or an earlier session has compiled. Tests
    of compiling itself, of its memory, and of the bits of runs that were compiled apart take a cache of their own.
    """
    folder, compiled = tmp_path_factory.mktemp("cache"), Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / "compile").symlink_to(compiled)
    return folder


@pytest.fixture
def tiny(tmp_path, corpus) -> Path:
    """A config with dropout, BPE, packing, accumulation 2, EMA and Muon that trains in a few seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus))
    return path


@pytest.fixture
def aurora(tmp_path, shared_cache) -> Aurora:
    return Aurora(tmp_path, shared_cache)


@pytest.fixture
def gpu_box(tmp_path):
    """Makes a stand-in for a machine with NVIDIA GPUs (tests/fake_nvml.py): `gpu_box(count=2)`."""
    from fake_nvml import boxes

    with boxes(tmp_path) as make:
        yield make
