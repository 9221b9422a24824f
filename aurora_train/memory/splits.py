"""Into how many parts XLA:GPU splits the contraction of a matrix product: each part has a result of its own at first.

A product with few output tiles leaves multiprocessors idle, so XLA computes parts of the contraction side by side and
sums them. The partial results are memory: up to a tenth of the peak of a tiny step. The choice is XLA's cost model
(openxla/xla, `xla/backends/gpu/transforms/splitk_rewriter.cc`, 2025), whose fitted constants are given here under
their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)
ALIGNMENT_BITS = 128  # of the contraction of one part
_TILE = 212  # rows and columns of an output tile
_STEP_BYTES = 442  # of the contraction, that a tile takes in one go
_FLOPS = 2 + 4.73313  # an element: a product, a sum, and what goes with them
_FLOPS_PER_BYTE, _FLOPS_PER_CACHED_BYTE = 2842.3, 1846.31  # that moving a byte costs
_CACHED = 2.19872  # times the level-2 cache: what all tiles of one wave may read to be cached
_SUM_LAUNCH_FLOPS, _SUM_FLOPS_PER_BYTE = 2.74228e9, 677.076  # of adding the parts


@dataclass(frozen=True)
class Chip:
    """What XLA's rewrites ask of a GPU. `capability`: (major, minor), as NVIDIA counts."""

    multiprocessors: int
    l2_bytes: int
    capability: tuple[int, int]


class Product(NamedTuple):
    """batch x [m, k] @ [k, n]; the bits of an element of each side, of the sum and of the result."""

    batch: int
    m: int
    n: int
    k: int
    left_bits: int
    right_bits: int
    sum_bits: int
    result_bits: int


def splits(product: Product, chip: Chip) -> int:
    """The number of parts; 1 where the contraction is left whole."""
    return min(CHOICES, key=lambda parts: _cost(product, parts, chip))


def _cost(product: Product, parts: int, chip: Chip) -> float:
    """In FLOPs: waves of tiles, each bound by its arithmetic or by what it moves, and then the sum of the parts."""
    batch, k = product.batch * parts, _ceil(product.k, parts)
    waves = _ceil(batch * _ceil(product.m, _TILE) * _ceil(product.n, _TILE), chip.multiprocessors)
    steps = _ceil(k * max(product.left_bits, product.right_bits) // 8, _STEP_BYTES)
    arithmetic = int(_FLOPS * _TILE * _TILE * steps * _STEP_BYTES * product.sum_bits / 8)
    written_bits = product.sum_bits if parts > 1 else product.result_bits
    moved = sum(_TILE * k * bits // 8 for bits in (product.left_bits, product.right_bits))
    moved += _TILE * _TILE * written_bits // 8
    cached = moved * chip.multiprocessors < _CACHED * chip.l2_bytes
    wave = max(arithmetic, int(moved * (_FLOPS_PER_CACHED_BYTE if cached else _FLOPS_PER_BYTE)))
    if parts == 1:
        return wave * waves
    summed = batch * product.m * product.n * product.sum_bits // 8
    summed += product.batch * product.m * product.n * product.result_bits // 8
    return wave * waves + _SUM_LAUNCH_FLOPS + int(summed * _SUM_FLOPS_PER_BYTE)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
