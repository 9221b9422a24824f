"""Measures the speed of a device: the probes behind `aurora doctor --calibrate`."""

from __future__ import annotations

import time
from collections.abc import Callable

from aurora_train.machine.rates import Rates, device_name

DTYPES = ("float32", "bfloat16")
_SMALL_OPS = 32  # about the kernels of one block's forward pass


def measure(device) -> Rates:
    """Probe one jax device, which should be idle. Takes about 6 s on two processor cores, less on a GPU.

    Each figure is the best of repeated timings; other work on the device makes all rates too low.
    """
    import jax

    on_cpu = device.platform == "cpu"
    # Powers of two may suffer from cache-set conflicts or suit a kernel's tiles, so a size between them is tried too.
    widths, megabytes = ((1024, 1536), 128) if on_cpu else ((4096, 6144, 8192), 512)
    with jax.default_device(device):
        matmul = {dtype: max(_matmul_rate(width, dtype, for_s=0.8) for width in widths) for dtype in DTYPES}
        bandwidth = _triad_rate(megabytes, for_s=1.0)
        overhead = _loop_seconds(for_s=0.5)
        link = None if on_cpu else _link_rate(device, megabytes, for_s=1.0)
    return Rates(
        matmul=matmul,
        bandwidth=bandwidth,
        per_microbatch_seconds=overhead,
        source="measured",
        date=time.strftime("%Y-%m-%d"),
        device=device_name(device),
        note=f"best of repeated products of {' and '.join(map(str, widths))}, a triad of {megabytes} MB arrays",
        link=link,
    )


def best_seconds(work: Callable[[], object], for_s: float) -> float:
    """The time of the fastest of at least two calls within `for_s` seconds, after one that does not count."""
    work()
    best, until = float("inf"), time.perf_counter() + for_s
    for number in range(10**6):
        start = time.perf_counter()
        if number >= 2 and start > until:
            break
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_seconds(width: int, dtype: str, for_s: float) -> float:
    """Seconds of one square product on jax's default device. It holds 2 * width**3 FLOPs."""
    import jax
    import jax.numpy as jnp

    # bfloat16 products accumulate in and return float32: XLA:CPU has a fast kernel only for that form.
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    a = jax.random.normal(jax.random.key(0), (width, width), dtype)
    return best_seconds(lambda: multiply(a, a).block_until_ready(), for_s)


def _matmul_rate(width: int, dtype: str, for_s: float) -> float:
    return 2 * width**3 / matmul_seconds(width, dtype, for_s)


def _triad_rate(megabytes: int, for_s: float) -> float:
    """Bytes/s of a = c + s * a over float32 arrays too large for any cache (after McCalpin, STREAM, 1995)."""
    import jax
    import jax.numpy as jnp

    number = megabytes * 10**6 // 4
    # Donated, so that it writes where it reads: page faults on a fresh array would cost far more than the triad.
    triad = jax.jit(lambda a, c: c + 0.5 * a, donate_argnums=0)
    held, c = [jnp.ones(number)], jnp.ones(number)

    def once():
        held[0] = triad(held[0], c)
        held[0].block_until_ready()

    return 3 * 4 * number / best_seconds(once, for_s)


def _link_rate(device, megabytes: int, for_s: float) -> float:
    """Bytes/s one way between a device and pinned memory of its processor, from copies there and back."""
    import jax
    import jax.numpy as jnp

    here = jax.sharding.SingleDeviceSharding(device)
    there = here.with_memory_kind("pinned_host")
    array = jax.device_put(jnp.ones(megabytes * 10**6 // 4), here)

    def once():
        jax.device_put(jax.device_put(array, there).block_until_ready(), here).block_until_ready()

    return 2 * array.nbytes / best_seconds(once, for_s)


def _loop_seconds(for_s: float) -> float:
    """Seconds of one loop iteration of small dependent products: the slope between a short and a long loop."""
    import jax
    import jax.numpy as jnp

    small = jnp.eye(16)

    def body(_, x):
        for _ in range(_SMALL_OPS):
            x = jnp.tanh(x @ small)  # a product is never fused away, and each depends on the previous one
        return x

    def seconds(iterations: int) -> float:
        loop = jax.jit(lambda x: jax.lax.fori_loop(0, iterations, body, x))
        return best_seconds(lambda: loop(small).block_until_ready(), for_s / 2)

    short, long = 10, 210
    return max(seconds(long) - seconds(short), 0.0) / (long - short)
