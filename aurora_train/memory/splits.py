"""Into how many parts XLA:GPU splits the contraction of a matrix product: each part has a result of its own at first.

A product with few output tiles leaves multiprocessors idle, so XLA computes parts of the contraction side by side and
sums them. The partial results are memory: up to a tenth of the peak of a tiny step. The choice is XLA's cost model
(openxla/xla, `xla/backends/gpu/transforms/splitk_rewriter.cc`, 2026), whose fitted weights are given here under their
meaning; jax 0.10.2 splits as it says (tests/memory/test_splits.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TILE = 128  # rows and columns of an output tile
CHOICES = tuple(2**i for i in range(12))
FLOP = 100.0  # the cost of one; the others are in the same unit


class Weights(NamedTuple):
    """Of a byte that a product moves, a byte that the sum of the parts moves, and the launch of that sum."""

    moved: float
    summed: float
    launch: float


_WEIGHTS = (  # from this major compute capability on
    (10, Weights(0.0848863, 189.711, 1.21563e08)),
    (9, Weights(0.194136, 193.1384, 4.36e07)),
    (0, Weights(0.0666955, 467.815, 5.65307e07)),
)


@dataclass(frozen=True)
class Chip:
    """What XLA's rewrites ask of a GPU. `capability`: (major, minor), as NVIDIA counts."""

    multiprocessors: int
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
    weights = next(weights for major, weights in _WEIGHTS if chip.capability[0] >= major)
    return min(CHOICES, key=lambda parts: _cost(product, parts, chip.multiprocessors, weights))


def _cost(product: Product, parts: int, multiprocessors: int, weights: Weights) -> float:
    """Waves of tiles, bound by their arithmetic or by what they move, and then the sum of the parts."""
    m, n, k, batch = product.m, product.n, _ceil(product.k, parts), product.batch * parts
    rows, columns = min(m, TILE), min(n, TILE)
    slots = multiprocessors * TILE * TILE / (rows * columns)
    waves = max(1.0, batch * _ceil(m, TILE) * _ceil(n, TILE) / slots)
    arithmetic = 2 * rows * columns * k * waves * FLOP
    read = product.batch * product.k * (m * product.left_bits + n * product.right_bits) / 8
    written = batch * m * n * (product.sum_bits if parts > 1 else product.result_bits) / 8
    cost = max(arithmetic, (read + written) * weights.moved)
    if parts == 1:
        return cost
    summed = (batch * product.sum_bits + product.batch * product.result_bits) * m * n / 8
    return cost + weights.launch + summed * weights.summed


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
