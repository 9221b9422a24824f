"""What an open NWB file holds, in one list: its units, its tables of intervals, its time series, and broken links.

Links are followed, as a reader would, so that each thing is listed under every path by which a config may name it.
"""

from __future__ import annotations

MOST = 24  # lines of a kind that are listed


def at(file, where: str):
    """The group or dataset at a path below an open file or group; None if there is none, or a link leads nowhere."""
    try:
        return file.get(where) if where else None
    except (KeyError, OSError):
        return None


def is_series(node) -> bool:
    """Whether a node is a time series: a group that holds `data`, and `timestamps` or `starting_time`."""
    if not hasattr(node, "keys") or at(node, "data") is None:
        return False
    return any(at(node, name) is not None for name in ("timestamps", "starting_time"))


def series_paths(file) -> list[str]:
    """Every time series of an open file, as paths that `data.behavior` takes."""
    return [name for name, node in _walk(file) if is_series(node)]


def unit_tables(file) -> list[str]:
    """Every table of units, as paths that `data.units_table` takes."""
    return [name for name, node in _walk(file) if _has(node, "spike_times", "spike_times_index")]


def interval_tables(file) -> list[str]:
    """Every table of trials, epochs or other intervals, as paths that `data.trials` takes."""
    return [name for name, node in _walk(file) if _has(node, "start_time", "stop_time")]


def contents(file) -> str:
    """A text of several lines that names what a config may name, each with its size."""
    units, intervals, series, broken = [], [], [], []
    for name, node in _walk(file):
        if node is None:
            broken.append(f"{name}: a link that leads nowhere")
        elif _has(node, "spike_times", "spike_times_index"):
            units.append(f"{name}: {len(node['spike_times_index'])} units, {len(node['spike_times'])} spikes")
        elif _has(node, "start_time", "stop_time"):
            columns = sorted(set(node) - {"id", "start_time", "stop_time"})
            more = f", with {', '.join(columns[:6])}" if columns else ""
            intervals.append(f"{name}: {len(node['start_time'])} intervals{more}")
        elif is_series(node):
            series.append(f"{name}: {_of_series(node)}")
    parts = {"units": units, "trials": intervals, "time series": series, "broken": broken}
    lines = []
    for kind, found in parts.items():
        shown = found[:MOST] + ([f"and {len(found) - MOST} more"] if len(found) > MOST else [])
        lines += [f"{kind}: {line}" for line in shown]
    return "it holds:\n    " + "\n    ".join(lines) if lines else "it holds no units, intervals or time series"


def text(value) -> str:
    """A string of an HDF5 file, which h5py returns as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _of_series(node) -> str:
    data = node["data"]
    shape, unit = list(getattr(data, "shape", ())), text(data.attrs.get("unit", "of no unit"))
    if at(node, "timestamps") is not None:
        return f"{shape} {unit}, at {len(node['timestamps'])} timestamps"
    return f"{shape} {unit}, {float(node['starting_time'].attrs.get('rate', 0.0)):g} Hz"


def _has(node, *names: str) -> bool:
    """Whether a node is a group that has all of these, behind links that lead somewhere (`in` is true of any link)."""
    return hasattr(node, "keys") and all(at(node, name) is not None for name in names)


def _walk(group, prefix: str = "", above: frozenset = frozenset()):
    """(path, node) of all groups below a group, parents first; (path, None) for a link that leads nowhere.

    A link to a group that contains it is not followed again.
    """
    for name in group:
        if not prefix and name == "specifications":
            continue  # the schema, stored as text
        path = f"{prefix}{name}"
        node = at(group, name)
        if node is None:
            yield path, None
        elif hasattr(node, "keys") and node.id not in above:
            yield path, node
            yield from _walk(node, f"{path}/", above | {node.id})
