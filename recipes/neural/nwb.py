"""Neural recordings in the NWB 2 layout (HDF5): spike times of units, a table of trials, one behavioural series.

Read and written with h5py alone. NWB stores a ragged column as two datasets: the concatenated values of all rows, and
an index whose entry k is one past the end of row k. Times are seconds on one clock for the whole file. Layout: NWB 2.x
schema (nwb-schema.readthedocs.io) and hdmf-common's DynamicTable and VectorIndex.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aurora_train.errors import MissingExtra, UserError


@dataclass(frozen=True)
class Recording:
    """One session, as far as a decoder needs it.

    Attributes:
        identifier: the file's own identifier, which enters the hash that holds trials out.
        spike_times: one sorted float64 array of seconds per unit.
        unit_ids: int64[U].
        trial_ids: int64[K]; trial_start, trial_stop: float64[K] seconds.
        behavior: float64[T, D] in `behavior_unit`, already converted; behavior_times: float64[T] seconds, increasing.
        trial_columns: further numeric columns of the trial table, each of length K (used only for writing).
    """

    identifier: str
    description: str
    spike_times: list[np.ndarray]
    unit_ids: np.ndarray
    trial_ids: np.ndarray
    trial_start: np.ndarray
    trial_stop: np.ndarray
    behavior: np.ndarray
    behavior_times: np.ndarray
    behavior_unit: str
    trial_columns: dict[str, np.ndarray] = field(default_factory=dict)


def h5py_module():
    """h5py, imported when first needed; MissingExtra names the command that installs it."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("h5py", "neural", "reading and writing neural recordings") from error
    return h5py


def read_recording(
    path: str | Path, *, behavior: str, units: str = "units", trials: str = "intervals/trials"
) -> Recording:
    """Read the units, the trials and one behavioural series; `behavior`, `units`, `trials` are paths in the file.

    The series is `data` [T, D] or [T] with `timestamps`, or `starting_time` and its `rate`; it is multiplied by its
    `conversion` and shifted by its `offset`, as NWB specifies. Raises UserError, which names what the file holds.
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
            unit_ids, spike_times = _read_units(file, path, units)
            trial_ids, start, stop = _read_trials(file, path, trials)
            values, times, unit = _read_series(file, path, behavior)
            identifier = _text(file["identifier"][()]) if "identifier" in file else path.name
            description = _text(file["session_description"][()]) if "session_description" in file else ""
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error}", where="data.source",
            hint="the copy may be cut short: compare its size with the original's",
        ) from error  # fmt: skip
    return Recording(identifier, description, spike_times, unit_ids, trial_ids, start, stop, values, times, unit)


def _read_units(file, path, where):
    table = _group(file, path, where, "data.source", needs=("spike_times", "spike_times_index"))
    ends = table["spike_times_index"][()].astype(np.int64)
    spikes = table["spike_times"][()].astype(np.float64)
    if len(ends) == 0:
        raise UserError(f"the units table of {path} is empty", where="data.source", why="there is nothing to decode")
    if np.any(np.diff(ends, prepend=0) < 0) or ends[-1] > len(spikes):
        raise UserError(
            f"/{where}/spike_times_index of {path} does not index its spike_times",
            where="data.source",
            why=f"entries must not decrease or exceed {len(spikes)}, the number of spikes",
        )
    starts = np.concatenate([[0], ends[:-1]])
    ids = table["id"][()].astype(np.int64) if "id" in table else np.arange(len(ends))
    return ids, [np.sort(spikes[a:b]) for a, b in zip(starts, ends, strict=True)]


def _read_trials(file, path, where):
    table = _group(file, path, where, "data.trials", needs=("start_time", "stop_time"))
    start, stop = table["start_time"][()].astype(np.float64), table["stop_time"][()].astype(np.float64)
    ids = table["id"][()].astype(np.int64) if "id" in table else np.arange(len(start))
    if np.any(~(stop > start)):
        bad = int(ids[np.argmax(~(stop > start))])
        raise UserError(
            f"trial {bad} of {path} does not stop after it starts",
            where="data.source",
            why="each trial needs a finite start_time before its stop_time",
        )
    return ids, start, stop


def _read_series(file, path, where):
    if not _is_series(file.get(where)):
        paths = series_paths(file)
        raise UserError(
            f"{path} has no time series at `{where}`",
            where="data.behavior",
            why="a series is a group that holds `data` and either `timestamps` or `starting_time`",
            hint="it has: " + ", ".join(paths) if paths else "it holds no time series at all",
        )
    series = file[where]
    data, attributes = series["data"], series["data"].attrs
    values = data[()].astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not 1 <= values.shape[1] <= 3:
        raise UserError(
            f"`{where}` of {path} has the shape {data.shape}",
            where="data.behavior",
            why="a velocity is [time] or [time, 1 to 3 axes]",
        )
    values = values * float(attributes.get("conversion", 1.0)) + float(attributes.get("offset", 0.0))
    if "timestamps" in series:
        times = series["timestamps"][()].astype(np.float64)
    else:
        first = series["starting_time"]
        times = float(first[()]) + np.arange(len(values)) / float(first.attrs["rate"])
    if len(times) != len(values) or np.any(~(np.diff(times) > 0)):
        raise UserError(
            f"the timestamps of `{where}` in {path} do not match its data",
            where="data.behavior",
            why=f"{len(values)} samples need as many increasing times; there are {len(times)}",
        )
    return values, times, _text(attributes.get("unit", "unknown"))


def _group(file, path, where, key, needs):
    group = file.get(where)
    missing = [name for name in needs if group is None or name not in group]
    if missing:
        there = sorted(group) if group is not None else sorted(file)
        raise UserError(
            f"{path} has no `{where}/{missing[0]}`",
            where=key,
            why=f"{'/' + where if group is not None else 'the file'} holds: {', '.join(there) or 'nothing'}",
        )
    return group


def _is_series(node) -> bool:
    return hasattr(node, "keys") and "data" in node and ("timestamps" in node or "starting_time" in node)


def series_paths(file) -> list[str]:
    """Every time series of an open file, as paths that `data.behavior` takes."""
    paths = []
    file.visititems(lambda name, node: paths.append(name) if _is_series(node) else None)
    return paths


def _nearby(path: Path) -> str | None:
    there = sorted(p.name for p in path.parent.glob("*.nwb")) if path.parent.is_dir() else []
    return f"{path.parent} has: {', '.join(there[:8])}" if there else None


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def write_recording(path: str | Path, recording: Recording, *, behavior: str, rates=None) -> None:
    """Write an NWB 2.7 file that pynwb opens; the same recording gives the same content, dates and ids included.

    `behavior` is `processing/<module>/<series>`. `rates`, if given, is (float32[T, U] in Hz, period in seconds): the
    rates from which the spikes were drawn, stored beside them. The file appears complete or not at all.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with h5py_module().File(partial, "w") as file:
            _write(_Writer(file, recording.identifier), recording, behavior, rates)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(writer, recording, behavior, rates):
    _, module, series = behavior.split("/")
    writer.root(recording)
    writer.units(recording)
    writer.trials(recording)
    measured = writer.group(f"processing/{module}", "ProcessingModule", description="measured behaviour")
    writer.series(measured, series, recording.behavior, recording.behavior_unit, timestamps=recording.behavior_times)
    if rates is not None:
        values, period_s = rates
        truth = writer.group("processing/simulation", "ProcessingModule", description="what the simulation knows")
        writer.series(truth, "true_rates", values, "Hz", rate=1.0 / period_s)


class _Writer:
    """Writes groups and datasets with the attributes that NWB readers need."""

    def __init__(self, file, identifier):
        self.file, self.identifier = file, identifier

    def _typed(self, node, neurodata_type, namespace="core", **attributes):
        # uuid5, not uuid4: the object ids are a function of the recording, so a rewrite changes nothing.
        object_id = str(uuid.uuid5(uuid.NAMESPACE_OID, self.identifier + node.name))
        node.attrs.update(neurodata_type=neurodata_type, namespace=namespace, object_id=object_id, **attributes)
        return node

    def group(self, name, neurodata_type, **attributes):
        return self._typed(self.file.create_group(name), neurodata_type, **attributes)

    def root(self, recording):
        self._typed(self.file, "NWBFile", nwb_version="2.7.0")
        started = "2000-01-01T00:00:00+00:00"
        text = {
            "identifier": recording.identifier,
            "session_description": recording.description,
            "session_start_time": started,
            "timestamps_reference_time": started,
        }
        for name, value in text.items():
            self.file[name] = value
        self.file["file_create_date"] = [started]
        for name in ("acquisition", "analysis", "general", "stimulus/presentation", "stimulus/templates"):
            self.file.create_group(name)

    def _column(self, table, name, values, description, neurodata_type="VectorData", **attributes):
        column = table.create_dataset(name, data=values)
        if neurodata_type != "ElementIdentifiers":
            attributes["description"] = description
        return self._typed(column, neurodata_type, "hdmf-common", **attributes)

    def units(self, recording):
        table = self.group("units", "Units", colnames=["spike_times"], description="sorted units")
        ends = np.cumsum([len(times) for times in recording.spike_times]).astype(np.uint64)
        times = np.concatenate(recording.spike_times)
        spikes = self._column(table, "spike_times", times, "spike times of all units, in seconds")
        index = self._column(table, "spike_times_index", ends, "index for spike_times", "VectorIndex")
        index.attrs["target"] = spikes.ref
        self._column(table, "id", recording.unit_ids, "", "ElementIdentifiers")

    def trials(self, recording):
        columns = {"start_time": recording.trial_start, "stop_time": recording.trial_stop, **recording.trial_columns}
        table = self.group("intervals/trials", "TimeIntervals", colnames=list(columns), description="trials")
        for name, values in columns.items():
            self._column(table, name, values, f"{name.replace('_', ' ')} of the trial, in seconds")
        self._column(table, "id", recording.trial_ids, "", "ElementIdentifiers")

    def series(self, parent, name, values, unit, *, timestamps=None, rate=None):
        series = self.group(f"{parent.name}/{name}", "TimeSeries", description=name, comments="none")
        values = np.asarray(values, np.float32)
        data = series.create_dataset("data", data=values, compression="gzip", compression_opts=1)
        data.attrs.update(unit=unit, conversion=1.0, offset=0.0, resolution=-1.0)
        if timestamps is not None:
            times = series.create_dataset("timestamps", data=np.asarray(timestamps, np.float64))
            times.attrs.update(interval=np.int32(1), unit="seconds")
        else:
            start = series.create_dataset("starting_time", data=0.0)
            start.attrs.update(rate=np.float32(rate), unit="seconds")
