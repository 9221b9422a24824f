"""A small recording for tests: random spikes at known rates, equal trials, a velocity that the spikes follow."""

from __future__ import annotations

import numpy as np

from neural.nwb import Recording
from neural.nwb_write import write_recording

BEHAVIOR = "processing/behavior/hand_vel"


def session(trials: int = 24, units: int = 6, seed: int = 0, identifier: str = "small") -> Recording:
    """`trials` of 0.9 s, one a second from second 1; behaviour at 100 Hz in cm/s."""
    rng = np.random.default_rng(seed)
    length_s = trials + 2
    times = np.arange(100 * length_s) / 100
    velocity = np.stack([10 * np.sin(2 * np.pi * times), 5 * np.cos(2 * np.pi * times)], axis=1)
    rates_hz = 20 + 15 * np.cos(np.arange(units) + np.arctan2(velocity[:, :1], velocity[:, 1:]))
    spikes = [np.sort(times[rng.random(len(times)) < rate / 100] + rng.uniform(0, 0.01)) for rate in rates_hz.T]
    starts = 1.0 + np.arange(trials)
    return Recording(identifier, "made for a test", spikes, np.arange(units) + 10, np.arange(trials), starts,
                     starts + 0.9, velocity, times, "cm/s")  # fmt: skip


def write_session(path, **settings):
    """The same as an NWB file."""
    write_recording(path, session(**settings), behavior=BEHAVIOR)
    return path
