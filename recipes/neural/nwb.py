"""Neural recordings in the NWB 2 layout (HDF5): spike times of units, a table of trials, one behavioural series.

Read with h5py alone. NWB stores a ragged column as two datasets: the concatenated values of all rows, and an index
whose entry k is one past the end of row k, in the smallest unsigned type that holds it. Times are seconds on one clock
for the whole file. Layout: NWB 2.x schema (nwb-schema.readthedocs.io), hdmf-common's DynamicTable and VectorIndex.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aurora_train.errors import MissingExtra, UserError, nearest
from neural.nwb_contents import at, contents, interval_tables, is_series, series_paths, text, unit_tables


@dataclass(frozen=True)
class Recording:
    """One session, as far as a recipe needs it.

    Attributes:
        identifier: the file's own identifier, which enters the hash that holds trials out.
        spike_times: one sorted float64 array of seconds per unit.
        unit_ids: int64[U].
        trial_ids: int64[K]; trial_start, trial_stop: float64[K] seconds. K is 0 if no table of trials was named.
        behavior: float64[T, D] in `behavior_unit`, already converted; None if no series was named.
        behavior_times: float64[T] seconds, increasing.
        trial_columns: further numeric columns of the trial table, each of length K (used only for writing).
        observed: float64[n, 2] for each unit, the intervals in which it was observed; None if the file has none.
        unfinished: rows of the trial table that were left out because they lack a finite start or stop.
    """

    identifier: str
    description: str
    spike_times: list[np.ndarray]
    unit_ids: np.ndarray
    trial_ids: np.ndarray
    trial_start: np.ndarray
    trial_stop: np.ndarray
    behavior: np.ndarray | None = None
    behavior_times: np.ndarray | None = None
    behavior_unit: str = ""
    trial_columns: dict[str, np.ndarray] = field(default_factory=dict)
    observed: list[np.ndarray] | None = None
    unfinished: int = 0


def h5py_module():
    """h5py, imported when first needed; MissingExtra names the command that installs it."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("h5py", "neural", "reading and writing neural recordings") from error
    return h5py


def read_recording(
    path: str | Path, *, behavior: str | None, units: str = "units", trials: str | None = "intervals/trials"
) -> Recording:
    """Read the units, the trials and one behavioural series; `behavior`, `units`, `trials` are paths in the file.

    `behavior` or `trials` of None are not read. Raises UserError, which names what the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no recording {path}", where="data.source", hint=_nearby(path))
    h5py = h5py_module()
    if not h5py.is_hdf5(path):
        raise UserError(
            f"{path} is not an HDF5 file",
            where="data.source",
            why="a recording is read as NWB 2, which is HDF5",
            hint="convert it with neuroconv or pynwb; an NWB file in Zarr form has to be exported to HDF5",
        )
    try:
        with h5py.File(path, "r") as file:
            _refuse_version_1(file, path)
            known = {name: text(file[name][()]) for name in ("identifier", "session_description") if name in file}
            parts = _read_units(file, path, units)
            parts |= _read_trials(file, path, trials)
            parts |= {} if behavior is None else _read_series(file, path, behavior)
    except OSError as error:
        raise _unreadable(path, error) from error
    return Recording(known.get("identifier", path.name), known.get("session_description", ""), **parts)


def _unreadable(path, error) -> UserError:
    if "filter" in str(error):
        return UserError(
            f"{path} is compressed in a way that h5py alone does not read: {error}", where="data.source",
            hint="pip install hdf5plugin, set HDF5_PLUGIN_PATH to its folder of plugins, or write the file with gzip",
        )  # fmt: skip
    return UserError(
        f"{path} cannot be read: {error}", where="data.source",
        hint="the copy may be cut short: compare its size with the original's",
    )  # fmt: skip


def _refuse_version_1(file, path) -> None:
    version = text(file["nwb_version"][()]) if "nwb_version" in file else ""  # NWB 2 has an attribute of that name
    if version.removeprefix("NWB-").startswith("1"):
        raise UserError(f"{path} is of the version {version}", where="data.source", why="NWB 1 has another layout",
                        hint="convert it to NWB 2 with pynwb")  # fmt: skip


def _read_units(file, path, where) -> dict:
    table = _table(file, path, where, "data.units_table", ("spike_times", "spike_times_index"), unit_tables)
    ends, spikes = _ends(table, "spike_times", path), _numbers(table, "spike_times", path, where)
    if len(ends) == 0:
        raise UserError(f"the units table of {path} is empty", where="data.source", why="there is nothing to decode")
    if ends[-1] == 0:
        raise UserError(f"none of the {len(ends)} units of {path} has a spike", where="data.source",
                        why=f"/{where}/spike_times is empty", hint=contents(file))  # fmt: skip
    ids = _ids(table, len(ends), path, where)
    times = [np.sort(part) for part in np.split(spikes, ends[:-1])]
    for unit, own in zip(ids, times, strict=True):
        if not np.isfinite(own).all():
            raise UserError(f"unit {unit} of {path} has a spike time that is not finite", where="data.source",
                            why="spike times are seconds")  # fmt: skip
    observed = None
    if "obs_intervals" in table and "obs_intervals_index" in table:
        rows = table["obs_intervals"][()].astype(np.float64).reshape(-1, 2)
        of_unit = _ends(table, "obs_intervals", path)
        if len(of_unit) != len(ids):
            raise UserError(f"/{where}/obs_intervals_index of {path} has {len(of_unit)} entries", where="data.source",
                            why=f"there are {len(ids)} units, and each has one")  # fmt: skip
        observed = np.split(rows, of_unit[:-1])
    return {"unit_ids": ids, "spike_times": times, "observed": observed}


def _ends(table, column: str, path) -> np.ndarray:
    """The end of each row of a ragged column, int64[rows], which is stored unsigned and may be as small as uint8."""
    ends, stored = table[f"{column}_index"][()].astype(np.int64), len(table[column])
    if np.any(np.diff(ends, prepend=0) < 0) or (len(ends) and ends[-1] != stored):
        raise UserError(
            f"{table.name}/{column}_index of {path} does not index its {column}",
            where="data.source",
            why=f"entries must not decrease, and the last one is {stored}, the number of values",
        )
    return ends


def _read_trials(file, path, where) -> dict:
    if where is None:
        nothing = np.zeros(0)
        return {"trial_ids": nothing.astype(np.int64), "trial_start": nothing, "trial_stop": nothing}
    table = _table(file, path, where, "data.trials", ("start_time", "stop_time"), interval_tables)
    start, stop = (_numbers(table, name, path, where) for name in ("start_time", "stop_time"))
    if len(start) != len(stop) or len(start) == 0:
        raise UserError(
            f"`{where}` of {path} has {len(start)} start times and {len(stop)} stop times", where="data.trials",
            hint="data.trials=null cuts the recording into equal stretches",
        )  # fmt: skip
    ids = _ids(table, len(start), path, where)
    whole = np.isfinite(start) & np.isfinite(stop)
    if np.any(whole & ~(stop > start)) or not whole.any():
        bad = int(ids[np.argmax(~(stop > start))])
        raise UserError(
            f"trial {bad} of {path} does not stop after it starts",
            where="data.source",
            why=f"a row of `{where}` needs a finite start_time before its stop_time",
        )
    parts = {"trial_ids": ids, "trial_start": start, "trial_stop": stop}
    return {name: values[whole] for name, values in parts.items()} | {"unfinished": int((~whole).sum())}


def _read_series(file, path, where) -> dict:
    """`data` [T, D] or [T] times its `conversion` plus its `offset`, with `timestamps` or `starting_time` and rate."""
    series = at(file, where)
    if not is_series(series):
        paths = series_paths(file)
        raise UserError(
            f"{path} has no time series at `{where}`" if where else f"no series of {path} is named",
            where="data.behavior",
            why="a series is a group that holds `data` and either `timestamps` or `starting_time`",
            hint=nearest(where, paths, contents(file), cutoff=0.8),
        )
    data, attributes = series["data"], series["data"].attrs
    values = _numbers(series, "data", path, where)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not 1 <= values.shape[1] <= 3 or not len(values):
        raise UserError(
            f"`{where}` of {path} has the shape {data.shape}",
            where="data.behavior",
            why="a velocity is [time] or [time, 1 to 3 axes]",
            hint=contents(file),
        )
    values = values * float(attributes.get("conversion", 1.0)) + float(attributes.get("offset", 0.0))
    if not np.isfinite(values).any():
        raise UserError(f"`{where}` of {path} has no finite value", where="data.behavior", hint=contents(file))
    times = _times(series, len(values), path, where)
    unit = text(attributes.get("unit", "unknown"))
    return {"behavior": values, "behavior_times": times, "behavior_unit": unit}


def _times(series, samples: int, path, where) -> np.ndarray:
    if at(series, "timestamps") is not None:
        times = _numbers(series, "timestamps", path, where)
    else:
        first, rate_hz = series["starting_time"], float(series["starting_time"].attrs.get("rate", 0.0))
        if not rate_hz > 0:
            raise UserError(f"`{where}` of {path} has a starting_time, but the rate {rate_hz:g} Hz",
                            where="data.behavior", why="a regular series needs a positive rate")  # fmt: skip
        times = float(first[()]) + np.arange(samples) / rate_hz
    if len(times) != samples or np.any(~(np.diff(times) > 0)):
        raise UserError(
            f"the timestamps of `{where}` in {path} do not match its data",
            where="data.behavior",
            why=f"{samples} samples need as many increasing times; there are {len(times)}",
        )
    return times


def _table(file, path, where, key, needs, alike):
    """The group at `where`; the error names what it lacks, and the tables of the file that have it."""
    group = at(file, where)
    missing = [name for name in needs if not hasattr(group, "keys") or at(group, name) is None]
    if missing:
        hint = nearest(where, alike(file), contents(file), form=f"{key}={{}}", cutoff=0.8)
        raise UserError(f"{path} has no `{where}/{missing[0]}`", where=key, hint=hint)
    return group


def _numbers(group, name: str, path, where) -> np.ndarray:
    """float64 values of a numeric dataset."""
    stored = group[name]
    if not hasattr(stored, "dtype") or stored.dtype.kind not in "fiu":
        kind = getattr(stored, "dtype", "a group")
        raise UserError(f"`{where}/{name}` of {path} does not hold numbers but {kind}", where="data.source")
    return stored[()].astype(np.float64)


def _ids(table, rows: int, path, where) -> np.ndarray:
    ids = table["id"][()].astype(np.int64) if "id" in table else np.arange(rows)
    unique, counts = np.unique(ids, return_counts=True)
    if len(ids) != rows or len(unique) != rows:
        twice = f"{unique[counts.argmax()]} is there twice" if len(unique) < len(ids) else "one for each row"
        raise UserError(f"`{where}` of {path} has {rows} rows and {len(ids)} ids", where="data.source",
                        why=f"ids must be unique: {twice}")  # fmt: skip
    return ids


def _nearby(path: Path) -> str | None:
    there = sorted(p.name for p in path.parent.glob("*.nwb")) if path.parent.is_dir() else []
    return f"{path.parent} has: {', '.join(there[:8])}" if there else None
