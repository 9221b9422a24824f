"""Compile the real step and read the compiler's own account of its memory; for a GPU that is not here too.

XLA's GPU compiler needs no GPU, only a description of one. Autotuning does not run there, so a matrix product may be
given another kernel than on the device; and cuDNN's own workspace is chosen on the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass

import numpy as np

from aurora_train.errors import MissingExtra

CUDNN_VERSION = 91000  # what a target is taken to have: no library is needed to compile for it


@dataclass(frozen=True)
class Compiled:
    """Bytes of a compiled step. `peak` = arguments + outputs - aliased + temporaries, by the compiler's own plan.

    `host`: temporaries in the processor's memory.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    host: int = 0

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


def compiled_bytes(compiled) -> Compiled:
    """The account of one `jax.stages.Compiled`, per device."""
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.host_temp_size_in_bytes,
    )


def can_compile_for_gpu() -> bool:
    """Whether the extra `[plan]` (or jax's own CUDA wheels) is installed."""
    return any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def target_devices(target, count: int = 1) -> list:
    """Compile-only devices of a target. MissingExtra without the extra `[plan]`."""
    if not can_compile_for_gpu():
        raise MissingExtra("jax-cuda12-plugin", "plan", "compiling for a GPU that is not here")
    from jax.experimental import topologies

    with quiet():
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target.config_text, topology=f"1x1x{count}"
        )
    return list(np.asarray(topology.devices, dtype=object))[:count]


@contextlib.contextmanager
def pretend_cudnn():
    """Within, cuDNN attention is traced as for a machine that has cuDNN: jax asks the library here for its version.

    The one place that reaches into jax: the version decides which forms are allowed, and nothing else; the bytes
    compiled with the real library at hand are the same. Where jax has moved the function, cuDNN must be installed.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as attention
    except ImportError:
        yield
        return
    known = getattr(attention, "check_cudnn_version", None)
    if known is None:
        yield
        return
    attention.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        attention.check_cudnn_version = known


@contextlib.contextmanager
def quiet():
    """Without what XLA writes to the process's stderr about drivers that are not there, and none are wanted."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(sink)
        os.close(saved)
