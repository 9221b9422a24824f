"""Bins of a recording's spikes and behaviour, within trials that are held out by hash.

No bin crosses a trial's edge, and trials may not overlap: no bin of a held-out trial is seen in training, not even as
an input. Bin t of a trial covers start + [t, t + 1) * bin; its velocity is the mean within the same bin.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from aurora_train.errors import UserError
from neural.nwb import Recording

SPLITS = ("train", "validation", "test")
SLOWEST = 10  # bins from one sample of the behaviour to the next, beyond which nothing is interpolated
FEWEST = 0.01  # share of all spikes that must fall into trials; fewer indicate two clocks


@dataclass(frozen=True)
class Trials:
    """Concatenated binned trials: rows offsets[k]:offsets[k + 1] are trial ids[k].

    Attributes:
        spikes: uint16[N, U] counts.
        velocity: float64[N, D] in `unit`; nan where the behaviour was not measured. D is 0 if no behaviour was read.
        unit_ids: int64[U], the units' ids in the file.
        starts: float64[K], the time of each trial's first bin in seconds.
        left_out: how many trials were left out, by reason.
    """

    spikes: np.ndarray
    velocity: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    identifier: str
    bin_s: float
    unit: str
    unit_ids: np.ndarray | None = None
    starts: np.ndarray | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def split(self, name: str, held_out: float) -> Trials:
        """The trials of one split, by a hash of (recording, trial): more trials never move one to another split.

        `held_out` is the share of test trials; half as many are for validation.
        """
        edges = {"test": (0, held_out), "validation": (held_out, 1.5 * held_out), "train": (1.5 * held_out, 1)}
        low, high = edges[name]
        share = [_share(self.identifier, int(i)) for i in self.ids]
        kept = [k for k, at in enumerate(share) if low <= at < high]
        if not kept:
            raise UserError(
                f"no trial of {self.identifier} falls into the {name} split",
                where="data.held_out",
                why=f"{len(self.ids)} trials are divided by a hash of their ids, {held_out:g} of them for test",
                hint="use more trials or a larger share",
            )
        rows = np.concatenate([np.arange(self.offsets[k], self.offsets[k + 1]) for k in kept])
        if not np.isfinite(self.velocity[rows]).all(axis=1).any():  # its mean and its score would be nan
            raise UserError(
                f"no bin of the {len(kept)} {name} trials of {self.identifier} has a measured behaviour",
                where="data.behavior", why="it has gaps where these trials are",
                hint="choose a series that was measured within trials, or another data.held_out",
            )  # fmt: skip
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[kept])])
        starts = None if self.starts is None else self.starts[kept]
        return dataclasses.replace(
            self, spikes=self.spikes[rows], velocity=self.velocity[rows], offsets=offsets, ids=self.ids[kept],
            starts=starts, left_out={},
        )  # fmt: skip


def _share(identifier: str, trial: int) -> float:
    digest = hashlib.sha256(f"{identifier}\0{trial}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def in_stretches(recording: Recording, stretch_s: float) -> Recording:
    """The recording with consecutive stretches of `stretch_s` seconds as its trials, for one that has none.

    They cover the time for which there are spikes and, if it was read, behaviour.
    """
    begin, end = _spike_span(recording)
    if recording.behavior_times is not None:
        begin, end = max(begin, recording.behavior_times[0]), min(end, recording.behavior_times[-1])
    starts = begin + np.arange(max(int((end - begin) / stretch_s + 1e-6), 0)) * stretch_s
    if not len(starts):
        raise UserError(
            f"{recording.identifier} has no stretch of {stretch_s:g} s with both spikes and behaviour",
            where="data.stretch_s", why=f"they share {max(end - begin, 0):.3f} s",
            hint="all times in the file must be seconds on one clock",
        )  # fmt: skip
    return dataclasses.replace(
        recording, trial_ids=np.arange(len(starts)), trial_start=starts, trial_stop=starts + stretch_s
    )


def bin_trials(recording: Recording, bin_s: float, unit_ids: list[int] | None = None) -> Trials:
    """Count spikes and average the behaviour in bins of `bin_s` seconds, within trials.

    `unit_ids` selects units by their id in the file; None takes all. Raises UserError for an unknown unit, for trials
    that overlap, and if spikes or behaviour cover fewer than half of the trials, which indicates two clocks.
    """
    columns = _columns(recording, unit_ids)
    bins = np.floor((recording.trial_stop - recording.trial_start) / bin_s + 1e-6).astype(int)
    kept, left_out = _usable(recording, columns, bins, bin_s)
    _refuse_overlap(recording, kept, bins, bin_s)
    edges = [recording.trial_start[k] + np.arange(bins[k] + 1) * bin_s for k in kept]
    # The edges of all trials are concatenated: the difference across a seam is not a bin, so it is masked out.
    flat = np.concatenate(edges)
    inside = np.concatenate([np.arange(len(e)) < len(e) - 1 for e in edges])
    spikes = np.empty((int(inside.sum()), len(columns)), np.uint16)
    for column, unit in enumerate(columns):
        passed = np.searchsorted(recording.spike_times[unit], flat)
        spikes[:, column] = np.diff(passed, append=0)[inside]
    _refuse_few_spikes(recording, columns, int(spikes.sum()))
    if recording.behavior is None:
        velocity = np.zeros((len(spikes), 0))
    else:
        velocity = _binned_behavior(recording, flat, inside, bin_s)
    offsets = np.concatenate([[0], np.cumsum(bins[kept])])
    return Trials(
        spikes, velocity, offsets, recording.trial_ids[kept], recording.identifier, bin_s, recording.behavior_unit,
        recording.unit_ids[columns], recording.trial_start[kept], left_out,
    )  # fmt: skip


class _Check(NamedTuple):
    """`passes`: bool[K], the trials that are not `reason`."""

    reason: str
    passes: np.ndarray
    where: str
    why: str
    hint: str = "all times in the file must be seconds on one clock"


def _usable(recording: Recording, columns, bins, bin_s) -> tuple[np.ndarray, dict[str, int]]:
    """The rows of the trials that can be used, and how many of the others there are by reason."""
    start, stop = recording.trial_start, recording.trial_stop
    good, left_out = np.ones(len(start), bool), {}
    for reason, passes, where, why, hint in _checks(recording, columns, bins, bin_s):
        if passes.sum() * 2 < len(start):
            raise UserError(
                f"{int((~passes).sum())} of {len(start)} trials of {recording.identifier} are {reason}", where=where,
                why=f"{why}; the trials reach from {start.min():.3f} to {stop.max():.3f} s", hint=hint,
            )  # fmt: skip
        number = int((good & ~passes).sum())
        left_out |= {reason: number} if number else {}
        good = good & passes
    left_out |= {"without a finite start and stop": recording.unfinished} if recording.unfinished else {}
    if not good.any():
        raise UserError(f"no trial of {recording.identifier} can be used", where="data.trials",
                        why=", ".join(f"{number} are {reason}" for reason, number in left_out.items()))  # fmt: skip
    return np.flatnonzero(good), left_out


def _checks(recording: Recording, columns, bins, bin_s):
    start, stop = recording.trial_start, recording.trial_stop
    yield _Check("shorter than a bin", bins > 0, "data.bin_ms", f"a bin has {1000 * bin_s:g} ms", "use shorter bins")
    if recording.behavior_times is not None:
        begin, end = recording.behavior_times[[0, -1]]
        covered = (start >= begin - bin_s) & (stop <= end + bin_s)
        why = f"it was measured from {begin:.3f} to {end:.3f} s"
        yield _Check("without behaviour", covered, "data.behavior", why)
    begin, end = _spike_span(recording)
    why = f"spikes were recorded from {begin:.3f} to {end:.3f} s"
    yield _Check("without spikes", (start <= end) & (stop >= begin), "data.source", why)
    if recording.observed is not None:
        seen = np.stack([_observed(recording.observed[unit], start, stop, bin_s) for unit in columns])
        least = int(seen.sum(axis=1).argmin())
        why = f"the obs_intervals of unit {recording.unit_ids[columns[least]]} cover {int(seen[least].sum())} trials"
        reason, hint = "not observed by every unit", "choose the units that were observed throughout"
        yield _Check(reason, seen.all(axis=0), "data.units", why, hint)


def _spike_span(recording: Recording) -> tuple[float, float]:
    spiking = [times for times in recording.spike_times if len(times)]
    return min(times[0] for times in spiking), max(times[-1] for times in spiking)


def _observed(intervals, start, stop, tolerance) -> np.ndarray:
    """bool[K]: whether one of the intervals, joined where they touch, covers each trial."""
    intervals = intervals[np.argsort(intervals[:, 0])]
    reached = np.maximum.accumulate(intervals[:, 1]) if len(intervals) else np.zeros(0)
    begins = np.flatnonzero(np.append(True, intervals[1:, 0] > reached[:-1] + tolerance)[: len(intervals)])
    ends = np.append(begins[1:] - 1, len(intervals) - 1)[: len(begins)]
    place = np.searchsorted(intervals[begins, 0], start + tolerance, side="right") - 1
    return (place >= 0) & (np.append(reached[ends], -np.inf)[place] >= stop - tolerance)


def _refuse_overlap(recording: Recording, kept, bins, bin_s) -> None:
    order = kept[np.argsort(recording.trial_start[kept], kind="stable")]
    start = recording.trial_start[order]
    over = (start + bins[order] * bin_s)[:-1] - start[1:]
    if np.any(over > 1e-6):
        k = int(np.argmax(over))
        raise UserError(
            f"trials {recording.trial_ids[order[k]]} and {recording.trial_ids[order[k + 1]]} of "
            f"{recording.identifier} overlap by {over[k]:.3f} s", where="data.trials",
            why="a bin of a held-out trial would be trained on", hint="name a table whose intervals are apart",
        )  # fmt: skip


def _refuse_few_spikes(recording: Recording, columns, counted: int) -> None:
    total = sum(len(recording.spike_times[unit]) for unit in columns)
    if counted == 0 or counted < FEWEST * total:
        raise UserError(
            f"{counted} of {total} spikes of {recording.identifier} fall into its trials", where="data.source",
            why=f"fewer than {FEWEST:.0%} indicate that spikes and trials are not on one clock",
            hint="spike times must be seconds, not samples or milliseconds",
        )  # fmt: skip


def _columns(recording: Recording, unit_ids):
    if unit_ids is None:
        return list(range(len(recording.unit_ids)))
    place = {int(unit): k for k, unit in enumerate(recording.unit_ids)}
    unknown = [unit for unit in unit_ids if unit not in place]
    if unknown or not unit_ids:
        raise UserError(
            f"{recording.identifier} has no unit {unknown[0]}" if unknown else "the list of units is empty",
            where="data.units",
            hint=f"its {len(place)} units have ids from {min(place)} to {max(place)}",
        )
    return [place[unit] for unit in unit_ids]


def _binned_behavior(recording: Recording, flat, inside, bin_s):
    """The mean in each bin; behaviour with fewer than two samples per bin is interpolated at the bin's centre."""
    times, values = recording.behavior_times, recording.behavior
    period = float(np.median(np.diff(times))) if len(times) > 1 else np.inf
    if period > SLOWEST * bin_s:
        raise UserError(
            f"the behaviour of {recording.identifier} has one sample in {period:g} s", where="data.behavior",
            why=f"bins of {1000 * bin_s:g} ms need one in {SLOWEST * bin_s:g} s at least",
            hint="its times must be seconds, not samples or milliseconds; or raise data.bin_ms",
        )  # fmt: skip
    if period <= bin_s / 2:
        passed = np.searchsorted(times, flat)
        sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(np.nan_to_num(values), axis=0)])
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(values).all(axis=1))])
        count = np.diff(passed, append=0)[inside]
        unmeasured = (count == 0) | (np.diff(bad[passed], append=0)[inside] > 0)
        total = np.diff(sums[passed], axis=0, append=np.zeros((1, values.shape[1])))[inside]
        return np.where(unmeasured[:, None], np.nan, total / np.maximum(count, 1)[:, None])
    centres = flat[inside] + bin_s / 2
    after = np.clip(np.searchsorted(times, centres), 1, len(times) - 1)
    gap = times[after] - times[after - 1] > 3 * period
    columns = [np.interp(centres, times, column) for column in values.T]
    return np.where(gap[:, None], np.nan, np.stack(columns, axis=1))
