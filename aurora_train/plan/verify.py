"""Compiles the real step, also for an absent GPU, and reads the compiler's own account of its memory.

XLA's GPU compiler needs no GPU, only a description of one. It does not autotune then, so a matrix product may get a
different kernel than on the device; and cuDNN chooses its workspace on the device.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass

import numpy as np

from aurora_train.errors import MissingExtra

CUDNN_VERSION = 91000  # the version that a target is assumed to have: compiling for it needs no library here


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


def collectives(compiled) -> dict[str, int]:
    """How many operations of each kind in a compiled step communicate; one in a loop runs once for each unit."""
    kinds = re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
    )
    return dict(collections.Counter(kinds).most_common())


def can_compile_for_gpu() -> bool:
    """Whether the extra `[plan]` (or jax's own CUDA wheels) is installed."""
    return any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def target_devices(target, count: int = 1) -> list:
    """Compile-only devices of a target. MissingExtra if the extra `[plan]` is not installed."""
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
    """In this context cuDNN attention is traced as on a machine with cuDNN; jax would ask the local library's version.

    This is the only place that patches jax. The version decides only which forms are allowed; compiling with the real
    library gives the same bytes. If a release of jax has moved the function, cuDNN has to be installed.
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
    """Suppress stderr: XLA warns there about missing drivers, which compiling for a target does not need."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(sink)
        os.close(saved)
