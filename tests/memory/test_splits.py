"""The contractions that XLA splits, as it split them when a step was compiled for an absent H100 (jax 0.10.2)."""

import pytest

from aurora_train.memory.splits import Chip, Product, splits

H100 = Chip(132, (9, 0))
COMPILED = [  # m, n, k, bits of the right side and of the result, parts
    (1024, 256, 2048, 16, 32, 8),
    (256, 256, 2048, 16, 32, 16),
    (768, 256, 2048, 16, 32, 8),
    (2048, 256, 2048, 16, 32, 4),
    (2048, 256, 1024, 16, 16, 4),
    (2048, 768, 256, 16, 16, 1),
    (2048, 256, 256, 32, 16, 1),
    (2048, 1024, 256, 16, 16, 1),
    (1024, 1024, 65536, 16, 32, 4),
]


@pytest.mark.parametrize("m, n, k, right, result, parts", COMPILED)
def test_a_contraction_is_split_as_the_compiler_split_it(m, n, k, right, result, parts):
    assert splits(Product(1, m, n, k, 16, right, 32, result), H100) == parts


def test_a_product_that_fills_the_chip_is_left_whole_and_fewer_multiprocessors_need_fewer_parts():
    large = Product(1, 16384, 16384, 4096, 16, 16, 32, 16)
    assert splits(large, H100) == 1
    small = Product(1, 256, 256, 65536, 16, 16, 32, 32)
    assert splits(small, Chip(16, (9, 0))) < splits(small, H100)
