"""Formats numbers and texts for people: bytes, rates, durations, shares. Bytes are decimal (1 GB = 1e9 bytes)."""

from __future__ import annotations

import re

_UNKNOWN = "n/a"
# Control characters but for tab and line break, which could steer a terminal, and those that turn a text around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def counted(number: float, noun: str) -> str:
    """A number with its noun: "1 row", "12,000 rows"."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def decimal(value: float) -> str:
    """A loss or a score: 2.5 -> "2.5000"; below 0.1 four significant digits, 0.00012345 -> "0.0001234"."""
    return f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4g}"


def words(name: str) -> str:
    """bits_per_byte -> "bits per byte"."""
    return name.replace("_", " ")


def count(value: float | None) -> str:
    """1234567 -> "1.23M". Three significant digits; None is "n/a"."""
    return _UNKNOWN if value is None else _scaled(value, ("", "k", "M", "G", "T", "P", "E"))


def size(value: float | None) -> str:
    """Bytes: 1234567 -> "1.23 MB"."""
    return _UNKNOWN if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB", " EB"))


def energy(joules: float) -> str:
    """Joules: 9000 -> "2.50 Wh", 5e6 -> "1.39 kWh"."""
    return _scaled(joules / 3600, (" Wh", " kWh", " MWh", " GWh"))


def percent(share: float | None) -> str:
    """0.1234 -> "12 %", 0.0123 -> "1.2 %"."""
    if share is None:
        return _UNKNOWN
    return f"{100 * share:.1f} %" if 0 < abs(share) < 0.1 else f"{100 * share:.0f} %"


def duration(seconds: float | None) -> str:
    """Seconds: 0.25 -> "0.25 s", 75 -> "1 min 15 s", 90000 -> "1 d 1 h"."""
    if seconds is None:
        return _UNKNOWN
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _scaled(value: float, suffixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(suffixes) - 1:
        value, power = value / 1000, power + 1
    if power == 0 and value == int(value):
        return f"{int(value)}{suffixes[0]}"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{suffixes[power]}"


def printable(text: str) -> str:
    """A text of someone else's for a terminal: characters that would steer it are written out, as `\\x1b`."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
