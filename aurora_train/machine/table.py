"""Known machines: peak rates, bandwidth and memory of one accelerator, every figure with its source.

Peaks are dense (no 2:4 sparsity), with float32 accumulation, for one device at its rated power. A device that is
not in the table is unknown: its peak is None and MFU is "n/a", never 0. This file imports no jax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Figure(NamedTuple):
    """A number with the place it was read."""

    value: float
    source: str


@dataclass(frozen=True)
class KnownMachine:
    """One row. `kinds` are the words of jax's `device_kind` that name the device; the longest match wins.

    `peak_flops`: dtype name ("float32" on plain cores, "tf32", "bfloat16", "fp8", "fp4") -> FLOP/s.
    `bandwidth`: bytes/s. `memory`: bytes, as sold. `unified`: processor and accelerator share that memory.
    `link`: bytes/s to or from the processor's memory, one way; None where memory is shared.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: dict[str, Figure]
    bandwidth: Figure
    memory: Figure
    link: Figure | None = None
    unified: bool = False
    memory_rule: str = "the device's own memory is the budget"


_DTYPES = ("float32", "tf32", "bfloat16", "fp8", "fp4")


def _row(name, kinds, source, tflops, gb_per_s, memory_gb, **rest) -> KnownMachine:
    """`tflops` in the order of `_DTYPES`, None where the device lacks the format or nobody published it."""
    rates = {d: Figure(t * 1e12, source) for d, t in zip(_DTYPES, tflops, strict=True) if t is not None}
    return KnownMachine(
        name, kinds, rates, Figure(gb_per_s * 1e9, source), Figure(memory_gb * 1e9, source), **rest
    )


_UNIFIED_RULE = (
    "memory is shared with the processor: the budget is MemAvailable less a reserve, preallocation is off, and "
    "host offload frees nothing"
)
_PCIE4 = Figure(32e9, "PCI Express 4.0 x16: 16 GT/s on 16 lanes, one way")
_PCIE5 = Figure(64e9, "PCI Express 5.0 x16: 32 GT/s on 16 lanes, one way")
_C2C = Figure(450e9, "NVLink-C2C, 900 GB/s both ways together: NVIDIA GH200 datasheet (2024), DGX Station page (2026)")
_HOPPER = "NVIDIA H100 datasheet (2024), sparse tensor figures halved"
_H200 = "NVIDIA H200 datasheet (2024), sparse tensor figures halved"
_A100 = "NVIDIA A100 datasheet (2021)"
_BLACKWELL = "NVIDIA Blackwell datasheet and HGX page (2025), sparse tensor figures halved"
_ADA = "NVIDIA Ada GPU architecture whitepaper v2.02, float32-accumulate rates"
_GEFORCE_50 = "NVIDIA RTX Blackwell GPU architecture whitepaper v1.1, float32-accumulate rates"
_AMPERE = "NVIDIA GA102 GPU architecture whitepaper v2.1, float32-accumulate rates"
_CDNA3 = "AMD Instinct datasheet (2024), rates without sparsity"

TABLE: tuple[KnownMachine, ...] = (
    _row(
        "DGX Spark (GB10)", ("GB10",),
        "NVIDIA DGX Spark datasheet (2025): 1 PFLOP sparse fp4; dense fp4, fp8 and bf16 by halving",
        (31, None, 125, 250, 500), 273, 128, unified=True, memory_rule=_UNIFIED_RULE,
    ),
    _row(
        "DGX Station (GB300)", ("GB300",),
        "NVIDIA DGX Station page (2026): 20 PFLOP sparse fp4, 7.1 TB/s, 252 GB; bf16 and fp8 from the GB300 NVL72 page",
        (80, 1250, 2500, 5000, 10000), 7100, 252,
        memory_rule="the budget is the device's own HBM3e; the LPDDR5X beside it is host memory", link=_C2C,
    ),
    _row("B300", ("B300",), "NVIDIA HGX B300 page (2025)", (75, 1125, 2250, 4500, 13125), 8000, 288, link=_PCIE5),
    _row("GB200", ("GB200",), _BLACKWELL, (80, 1250, 2500, 5000, 10000), 8000, 186, link=_C2C),
    _row("B200", ("B200",), _BLACKWELL, (75, 1125, 2250, 4500, 9000), 8000, 180, link=_PCIE5),
    _row("GH200 96 GB", ("GH200",), "NVIDIA GH200 datasheet (2024)", (67, 494, 990, 1979, None), 4000, 96, link=_C2C),
    _row("H200", ("H200",), _H200, (67, 494.5, 989.5, 1979, None), 4800, 141, link=_PCIE5),
    _row("H200 NVL", ("H200 NVL",), _H200, (60, 417.5, 835.5, 1670.5, None), 4800, 141, link=_PCIE5),
    _row("H100 SXM", ("H100",), _HOPPER, (67, 494.5, 989.5, 1979, None), 3350, 80, link=_PCIE5),
    _row("H100 NVL", ("H100 NVL",), _HOPPER, (60, 417.5, 835.5, 1670.5, None), 3900, 94, link=_PCIE5),
    _row(
        "H100 PCIe", ("H100 PCIe",), "NVIDIA H100 datasheet (2023)",
        (51, 378, 756, 1513, None), 2000, 80, link=_PCIE5,
    ),
    _row("A100 80 GB", ("A100",), _A100, (19.5, 156, 312, None, None), 2039, 80, link=_PCIE4),
    _row("A100 80 GB PCIe", ("A100 80GB PCIe",), _A100, (19.5, 156, 312, None, None), 1935, 80, link=_PCIE4),
    _row(
        "A100 40 GB", ("A100-SXM4-40GB", "A100-PCIE-40GB"), _A100,
        (19.5, 156, 312, None, None), 1555, 40, link=_PCIE4,
    ),
    _row(
        "RTX PRO 6000 Blackwell", ("RTX PRO 6000 Blackwell",),
        "NVIDIA RTX Blackwell PRO GPU architecture whitepaper v1.0",
        (126, 251.9, 503.8, 1007.6, 2015.2), 1792, 96, link=_PCIE5,
    ),
    _row(
        "RTX PRO 6000 Blackwell Max-Q", ("RTX PRO 6000 Blackwell Max-Q",),
        "NVIDIA RTX PRO 6000 Max-Q datasheet (2025): 3,511 sparse fp4 TOPS; others by halving",
        (110, 219, 439, 878, 1755), 1792, 96, link=_PCIE5,
    ),
    _row("RTX 5090", ("RTX 5090",), _GEFORCE_50, (104.8, 104.8, 209.5, 419, 1676), 1792, 32, link=_PCIE5),
    _row("RTX 4090", ("RTX 4090",), _ADA, (82.6, 82.6, 165.2, 330.3, None), 1008, 24, link=_PCIE4),
    _row("RTX 3090", ("RTX 3090",), _AMPERE, (35.6, 35.6, 71, None, None), 936, 24, link=_PCIE4),
    _row(
        "RTX 6000 Ada", ("RTX 6000 Ada",), "NVIDIA RTX 6000 Ada datasheet (2023), sparse tensor figures halved",
        (91.1, 182.1, 364.2, 728.5, None), 960, 48, link=_PCIE4,
    ),
    _row("RTX A6000", ("RTX A6000",), _AMPERE, (38.7, 77.4, 154.8, None, None), 768, 48, link=_PCIE4),
    _row(
        "L40S", ("L40S",), "NVIDIA L40S datasheet (2023), sparse tensor figures halved",
        (91.6, 183, 362, 733, None), 864, 48, link=_PCIE4,
    ),
    _row(
        "L4", ("L4",), "NVIDIA L4 datasheet (2023), sparse tensor figures halved",
        (30.3, 60, 121, 242.5, None), 300, 24, link=_PCIE4,
    ),
    _row("MI300X", ("MI300X",), _CDNA3, (163.4, 653.7, 1307.4, 2614.9, None), 5300, 192, link=_PCIE5),
    _row(
        "MI300A", ("MI300A",), _CDNA3, (122.6, 490.3, 980.6, 1961.2, None), 5300, 128,
        unified=True, memory_rule=_UNIFIED_RULE,
    ),
    _row("MI325X", ("MI325X",), _CDNA3, (163.4, 653.7, 1307.4, 2614.9, None), 6000, 256, link=_PCIE5),
)

# Parts that carry a desktop card's name and are not it.
_NAMESAKES = re.compile(r"\b(laptop|mobile|5090 D|4090 D|MIG)\b", re.IGNORECASE)


def lookup(device_kind: str) -> KnownMachine | None:
    """The row for jax's `device_kind` ("NVIDIA H100 80GB HBM3"), or None for a device that is not in the table."""
    if _NAMESAKES.search(device_kind):
        return None
    best, best_length = None, 0
    for row in TABLE:
        for kind in row.kinds:
            if len(kind) > best_length and re.search(rf"\b{re.escape(kind)}\b", device_kind, re.IGNORECASE):
                best, best_length = row, len(kind)
    return best
