"""What the tests share: a small real corpus, small configs, the command line."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import pytest
from harness import TINY, Aurora

# The suite is written for the CPU; with the extra [plan] installed jax would look for a GPU first, and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do. What one worker or an earlier session compiled, nobody compiles again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"aurora-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Small modules of the interpreter's own library, alike in every Python we support.
MODULES = ("abc", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "colorsys", "copy", "csv", "dis", "enum",
           "fnmatch", "getopt", "glob", "gzip", "heapq", "hmac")


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
    """Prepared data and compiled programs, shared by the tests of one session that do not break them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path, corpus) -> Path:
    """A config with dropout, BPE, packing, accumulation 2, EMA and Muon that trains in a few seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus))
    return path


@pytest.fixture
def aurora(tmp_path, shared_cache) -> Aurora:
    return Aurora(tmp_path, shared_cache)
