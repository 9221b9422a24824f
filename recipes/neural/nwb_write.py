"""Writes a recording as an NWB 2.7 file that pynwb opens, with h5py alone, as which the simulated session is kept."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np

from neural.nwb import Recording, h5py_module


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
