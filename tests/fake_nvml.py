"""The other side of tests/fake_nvml.c: compiles it, makes its devices, moves its time, and says what they have used."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import mmap
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

pynvml = pytest.importorskip("pynvml", reason="needs the package nvidia-ml-py")

_FLOATS = ("limit_w", "least_w", "most_w", "clock_mhz", "most_mhz", "base_w", "swing", "period_s", "idle_w", "celsius",
           "counted_to_s", "millijoules")  # fmt: skip
_FLAGS = ("no_energy", "no_power", "no_cap", "no_clock", "lost", "writes")


class Device(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_double) for name in _FLOATS), *((name, ctypes.c_int64) for name in _FLAGS)]

    def integral(self, until_s: float) -> float:
        """Joules of the uncapped curve from time 0."""
        turn = 2 * math.pi / self.period_s
        return self.base_w * (until_s + self.swing / turn * (1 - math.cos(turn * until_s)))


class State(ctypes.Structure):
    _fields_ = [
        ("now_s", ctypes.c_double), ("wraps_at_mj", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("real_time", "count", "init_fails", "no_permission")),
        ("devices", Device * 8),
    ]  # fmt: skip


class Fake:
    """A box with `count` GPUs of 300 W. `devices` and `state` may be written at any time."""

    def __init__(self, file: Path, count: int = 1, real_time: bool = False):
        self.library, self.file = compiled(), file
        file.write_bytes(bytes(ctypes.sizeof(State)))
        with open(file, "r+b") as handle:
            self.state = State.from_buffer(mmap.mmap(handle.fileno(), 0))
        self.state.count, self.state.real_time = count, real_time
        self.devices = self.state.devices[:count]
        for index, device in enumerate(self.devices):
            device.limit_w = device.most_w = 300
            device.least_w, device.most_mhz, device.base_w, device.idle_w = 100, 2000, 240 - 40 * index, 60
            device.swing, device.period_s, device.celsius = 0.0, 7.0, 50

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which another process finds this box."""
        return {"FAKE_NVML": str(self.file), "LD_LIBRARY_PATH": str(self.library.parent)}

    def speed(self, index: int = 0) -> float:
        """The speed of a device now, of this process's library; 1 = not slowed."""
        return self._loaded.fake_speed(index)

    def load(self) -> None:
        """Make the bindings of this process use it."""
        os.environ["FAKE_NVML"] = str(self.file)
        self._loaded = ctypes.CDLL(str(self.library))  # the bindings' own loader then finds it by its name
        self._loaded.fake_speed.restype = ctypes.c_double
        self._loaded.fake_forget()

    def unload(self) -> None:
        """Leave no box behind for other tests of this process."""
        os.environ.pop("FAKE_NVML", None)
        self._loaded.fake_forget()


@cache
def compiled() -> Path:
    """The library, compiled once a process under the name that the bindings load."""
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler, cc")
    folder = Path(tempfile.mkdtemp(prefix="aurora-fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target, source = folder / "libnvidia-ml.so.1", Path(__file__).with_suffix(".c")
    command = [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", source, "-o", target, "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@contextlib.contextmanager
def boxes(folder: Path):
    """Yields a function that makes a box, which the bindings of this process see until the next one is made."""
    made: list[Fake] = []

    def make(**settings) -> Fake:
        made.append(Fake(folder / f"box{len(made)}", **settings))
        made[-1].load()
        return made[-1]

    yield make
    if made:
        made[-1].unload()
