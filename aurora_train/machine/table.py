"""Known machines: peak rates, bandwidth and memory of one accelerator, every figure with its source.

The figures are in `machines.toml` beside this file, which explains its keys; a user's own file of the same form is laid
over it. A device in neither is unknown: its peak is None and MFU is "n/a", never 0. This file does not import jax.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationError, model_validator

from aurora_train.config import Section, setting
from aurora_train.config.messages import explain
from aurora_train.config.yaml import Mark, Tree
from aurora_train.errors import UserError

_BUNDLED = Path(__file__).with_name("machines.toml")
_OWN_RULE = "the device's own memory is the budget"
_UNIFIED_RULE = (
    "memory is shared with the processor: the budget is MemAvailable less a reserve, preallocation is off, and "
    "host offload frees nothing"
)
_NAMESAKES = re.compile(r"\b(laptop|mobile|5090 D|4090 D|MIG)\b", re.IGNORECASE)  # these share a desktop card's name


def _in(unit: str, low: float, high: float, error: float, kind: type = float):
    """The type of a number in a unit. Outside of its range it was given in another, which differs by `error`."""

    def check(value):
        if low <= value <= high:
            return value
        meant = next((v for v in (value / error, value * error) if low <= v <= high), None)
        hint = f"; did you mean {meant:,.6g}?" if meant else ""
        raise ValueError(f"must be {unit}, from {low:,.6g} to {high:,.6g}; got {value:,.6g}{hint}")

    return Annotated[kind, AfterValidator(check)]


_Rate = _in("TFLOP/s", 0.01, 1e6, 1e12)
_Gigabytes = _in("GB (10^9 bytes)", 0.5, 1e5, 1e9)


class Figure(Section):
    """A number with its source."""

    value: float = setting(gt=0)
    source: str


class Share(Figure):
    """A share of something, with its source."""

    value: _in("a share of 1, not percent", 0.001, 1, 100)


class Bytes(Figure):
    """An amount of memory in bytes, or a rate in bytes/s, with its source."""

    value: _in("bytes (a link: bytes/s), not GB", 5e8, 1e14, 1e9)


class Tflops(Section):
    """TFLOP/s by the format of a product's operands; None if the device lacks it or it was not published."""

    float32: _Rate | None = None
    tf32: _Rate | None = None
    bfloat16: _Rate
    fp8: _Rate | None = None
    fp4: _Rate | None = None


class TargetChip(Section):
    """The compiler's description of an NVIDIA device; the limits apply to one multiprocessor."""

    capability: str = setting(pattern=r"^\d+\.\d$")
    multiprocessors: int = setting(gt=0)
    l2_bytes: _in("bytes, not MB", 2**17, 2**32, 2**20, int)
    clock_ghz: _in("GHz, not MHz", 0.1, 10, 1e3)
    threads: int = setting(gt=0)
    shared_kib: _in("KiB, not bytes", 16, 4096, 1024, int)
    shared_optin_kib: _in("KiB, not bytes", 16, 4096, 1024, int)
    lanes: int = setting(gt=0)


class KnownMachine(Section):
    """One machine of machines.toml. `kinds`: the words of jax's `device_kind` that name the device.

    `link`: bytes/s to or from the processor's memory, one way; None if memory is `unified`. `peers`, `network`: bytes/s
    one way into a device from the others of its box, and from another box; `per_box`: devices of a box. `reached`:
    share of the bfloat16 peak. `sees`, `free`: bytes. `chip` is None if this trainer cannot compile for the device in
    its absence.
    """

    name: str
    kinds: list[str] = setting(min_length=1)
    source: str
    tflops: Tflops
    gb_per_s: _Gigabytes
    memory_gb: _Gigabytes
    unified: bool = False
    memory_rule: str = _OWN_RULE
    link: Bytes | None = None
    peers: Bytes | None = None
    network: Bytes | None = None
    per_box: int | None = setting(None, ge=1)
    reached: Share | None = None
    device_kind: str | None = None
    chip: TargetChip | None = None
    sees: Bytes | None = None
    free: Bytes | None = None

    @model_validator(mode="after")
    def _complete(self):
        if self.unified == (self.link is not None):
            raise ValueError("needs either `link`, or `unified = true` where memory is shared with the processor")
        for name in ("device_kind", "sees", *(["free"] if self.unified else [])):
            if self.chip and getattr(self, name) is None:
                raise ValueError(f"`chip` needs `{name}` beside it, so that plans can be made for the machine")
        return self

    @property
    def peak_flops(self) -> dict[str, Figure]:
        """FLOP/s by dtype name."""
        rates = self.tflops.model_dump(exclude_none=True)
        return {dtype: Figure(value=rate * 1e12, source=self.source) for dtype, rate in rates.items()}

    @property
    def bandwidth(self) -> Figure:
        """Bytes/s of the device's memory."""
        return Figure(value=self.gb_per_s * 1e9, source=self.source)

    @property
    def memory(self) -> Figure:
        """The nominal size in bytes."""
        return Figure(value=self.memory_gb * 1e9, source=self.source)


class _Machines(Section):
    machine: dict[str, KnownMachine]


def known_machines() -> dict[str, KnownMachine]:
    """Every known machine by the name that `--machine` takes, in the order of the file; a user's own come last.

    A user's own machines are in $AURORA_MACHINES or ~/.config/aurora_train/machines.toml and replace bundled ones of
    the same name. Raises UserError, with file and key, if that file does not have the form of the bundled one.
    """
    written = os.environ.get("AURORA_MACHINES")
    own = Path(written or Path.home() / ".config" / "aurora_train" / "machines.toml")
    exists = os.path.isfile(own)  # unlike Path.is_file, False if the home folder may not be read
    if written and not exists:
        raise UserError("there is no such file of machines", where=written, why="AURORA_MACHINES names it")
    return _known(own if exists else None)


def lookup(device_kind: str) -> KnownMachine | None:
    """The machine with jax's `device_kind` ("NVIDIA H100 80GB HBM3"), or None for an unknown device.

    The longest matching word wins; of two equally long ones, the one in the user's own file.
    """
    best, best_length = None, 0
    for row in known_machines().values():
        for kind in row.kinds:
            is_namesake = _NAMESAKES.search(device_kind) and not _NAMESAKES.search(kind)
            if len(kind) < best_length or is_namesake:
                continue
            if re.search(rf"\b{re.escape(kind)}\b", device_kind, re.IGNORECASE):
                best, best_length = row, len(kind)
    return best


def slug(name: str) -> str:
    """Words in lower case joined by hyphens, without the vendor: "NVIDIA GeForce RTX 5090" -> "rtx-5090"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "amd", "instinct"))


@functools.cache
def _known(own: Path | None) -> dict[str, KnownMachine]:
    ours = _parse(_BUNDLED)
    known = _checked(_BUNDLED, ours, ours)
    return known if own is None else known | _checked(own, _parse(own), ours)


def _parse(file: Path) -> dict:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot be read as TOML: {error}", where=str(file)) from None


def _checked(file: Path, tree: dict, ours: dict) -> dict[str, KnownMachine]:
    """The machines of a file. Resolves the names of links, and adds the limits of a chip's compute capability."""
    machines = tree.get("machine")
    for name, entry in machines.items() if isinstance(machines, dict) else ():
        if name != slug(name):
            raise UserError(
                "this is not a name that `--machine` takes", where=f"{file}: machine.{name}",
                why="such names are in lower case, with hyphens between words", hint=f"[machine.{slug(name)}]",
            )  # fmt: skip
        chip = entry.get("chip") if isinstance(entry, dict) else None
        for kind in ("link", "peers", "network") if isinstance(entry, dict) else ():
            if isinstance(entry.get(kind), str):
                entry[kind] = _named(entry[kind], ours["link"], f"{file}: machine.{name}.{kind}")
        if isinstance(chip, dict):
            entry["chip"] = _limits(chip, ours["capability"], f"{file}: machine.{name}.chip") | chip
        if isinstance(entry, dict) and entry.get("unified"):
            entry.setdefault("memory_rule", _UNIFIED_RULE)
    tree = {key: value for key, value in tree.items() if tree is not ours or key == "machine"}
    try:
        return _Machines.model_validate(tree).machine
    except ValidationError as fault:
        raise UserError("\n  ".join(explain(fault, Tree(tree, {}, {(): Mark(str(file))}), _Machines))) from None


def _limits(chip: dict, known: dict, where: str) -> dict:
    """The limits of a multiprocessor that a chip's compute capability has; {} if the chip gives its own."""
    written, needed = chip.get("capability"), next(iter(known.values())).keys()
    lacking = [name for name in needed if name not in chip]
    if written in known or not isinstance(written, str) or not lacking:
        return known.get(written, {}) if isinstance(written, str) else {}
    raise UserError(
        f"the limits of compute capability {written} are not known here", where=where,
        why=f"known are {', '.join(known)}",
        hint=f"add {', '.join(lacking)} to the chip (CUDA C++ Programming Guide, \"Compute Capabilities\")",
    )  # fmt: skip


def _named(written: str, known: dict, where: str) -> dict:
    if written not in known:
        near = difflib.get_close_matches(written, known, 1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UserError(
            f"unknown link `{written}`", where=where, why=f"known links: {', '.join(known)}",
            hint=hint + 'or write its figure: link = { value = 64e9, source = "..." }',
        )  # fmt: skip
    return known[written]
