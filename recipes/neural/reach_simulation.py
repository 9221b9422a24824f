"""A simulated motor-cortex session: delayed random-target reaches, a latent state, and units that spike from it.

Every quantity is known, including the firing rates, and everything is a function of the seed alone. The ingredients are
those reported for primate M1/PMd: minimum-jerk reaches with corrective submovements (Flash & Hogan 1985; Novak et
al. 2002), activity that leads the hand by 100 ms, preparatory activity in its own dimensions, rotations and a large
condition-independent signal at movement onset (Churchland et al. 2012; Kaufman et al. 2016), directional tuning that
turns with posture (Caminiti et al. 1990), gain by speed (Moran & Schwartz 1999), saturation, a shared slow gain, and
a refractory period. Their sizes are arbitrary choices; only a real recording shows what a decoder is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neural.nwb import Recording
from neural.nwb_write import write_recording

VERSION = 1  # part of the file's name, so that a changed simulation does not read a file of an older one
PERIOD_S = 0.01  # of kinematics, latents and rates
LEAD_S = 0.10
REFRACTORY_S = 0.002
BEHAVIOR = "processing/behavior/hand_vel"


@dataclass(frozen=True)
class Simulation:
    """`rates` float32[T, U] in Hz at PERIOD_S from time 0, from which the spikes of `recording` were drawn."""

    recording: Recording
    rates: np.ndarray


def prepare_simulation(folder: Path, trials: int, units: int, seed: int) -> Path:
    """The simulated session as an NWB file in `folder`, written if it does not exist yet."""
    path = Path(folder) / f"reaches-v{VERSION}-{trials}x{units}-seed{seed}.nwb"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        simulation = simulate(trials, units, seed)
        write_recording(path, simulation.recording, behavior=BEHAVIOR, rates=(simulation.rates, PERIOD_S))
    return path


def true_counts(path: Path, trials) -> np.ndarray:
    """The expected counts of a simulated session's `Trials` in each bin, float64[N, U], from the rates in its file."""
    from neural.nwb import h5py_module

    with h5py_module().File(path, "r") as file:
        rates = file["processing/simulation/true_rates/data"][()].astype(np.float64)
    expected = np.concatenate([np.zeros((1, rates.shape[1])), np.cumsum(rates * PERIOD_S, axis=0)])
    at = np.arange(len(expected)) * PERIOD_S
    columns = trials.unit_ids  # the simulated ids number the columns
    counts = []
    for start, bins in zip(trials.starts, np.diff(trials.offsets), strict=True):
        edges = start + np.arange(bins + 1) * trials.bin_s
        passed = np.stack([np.interp(edges, at, expected[:, column]) for column in columns], axis=1)
        counts.append(np.diff(passed, axis=0))
    return np.concatenate(counts)


def simulate(trials: int, units: int, seed: int) -> Simulation:
    """A session of `trials` reaches seen by `units` units."""
    hand_seed, unit_seed, gain_seed, *spike_seeds = np.random.SeedSequence(seed).spawn(3 + units)
    session = _session(np.random.default_rng(hand_seed), trials)
    latents = _latents(session)
    gain = _smooth_noise(np.random.default_rng(gain_seed), len(latents), 1, time_constant_s=3.0)
    rates = _rates(np.random.default_rng(unit_seed), latents, session["speed_ahead"], gain, units)
    spikes = [_spikes(np.random.default_rng(s), rates[:, u]) for u, s in enumerate(spike_seeds)]
    recording = Recording(
        identifier=f"simulated-reaches-v{VERSION}-{trials}x{units}-seed{seed}",
        description="simulated delayed random-target reaches; not a recording of any animal",
        spike_times=spikes,
        unit_ids=np.arange(units),
        trial_ids=np.arange(trials),
        trial_start=session["target_on"],
        trial_stop=session["stop"],
        behavior=session["velocity"],
        behavior_times=np.arange(len(latents)) * PERIOD_S,
        behavior_unit="cm/s",
        trial_columns={"go_cue_time": session["go"], "move_onset_time": session["onset"]},
    )
    return Simulation(recording, rates.astype(np.float32))


def _session(rng, trials: int) -> dict[str, np.ndarray]:
    """The hand and the events: positions in cm from the centre of a 20 x 20 cm workspace, velocities in cm/s."""
    starts, targets, pieces, events = [], [], [], []
    clock, hand = 0.5, np.zeros(2)
    for _ in range(trials):
        target = rng.uniform(-10, 10, 2)
        while np.linalg.norm(target - hand) < 5:
            target = rng.uniform(-10, 10, 2)
        path = _reach(rng, hand, target)
        go = clock + rng.uniform(0.3, 0.7)
        onset = go + np.clip(rng.normal(0.25, 0.04), 0.15, 0.4)
        stop = onset + len(path) * PERIOD_S + rng.uniform(0.25, 0.45)
        events.append((clock, go, onset, stop))
        starts.append(hand), targets.append(target), pieces.append(path)
        hand, clock = path[-1], stop + rng.uniform(0.2, 0.4)
    length = int(round((clock + 0.5) / PERIOD_S))
    events = np.round(np.array(events) / PERIOD_S) * PERIOD_S
    position = np.zeros((length, 2))
    for path, (_, _, onset, _) in zip(pieces, events, strict=True):
        first = int(round(onset / PERIOD_S))
        position[first : first + len(path)] = path
        position[first + len(path) :] = path[-1]
    velocity = np.gradient(position, PERIOD_S, axis=0) + 0.8 * _smooth_noise(rng, length, 2, time_constant_s=0.08)
    ahead = int(round(LEAD_S / PERIOD_S))
    velocity_ahead = np.concatenate([velocity[ahead:], np.zeros((ahead, 2))])
    names = ("target_on", "go", "onset", "stop")
    return dict(zip(names, events.T, strict=True)) | {
        "displacement": (np.array(targets) - np.array(starts)) / 10.0,
        "position": position,
        "velocity": velocity,
        "velocity_ahead": velocity_ahead / 30.0,
        "speed_ahead": np.linalg.norm(velocity_ahead, axis=1) / 30.0,
    }


def _reach(rng, start, target) -> np.ndarray:
    """Positions of one reach at PERIOD_S: a skewed, slightly curved minimum-jerk path, often with a correction."""
    distance = np.linalg.norm(target - start)
    duration = (0.32 + 0.014 * distance) * np.exp(0.12 * rng.normal())
    end = target + rng.normal(0, 0.5, 2)
    corrects = rng.random() < 0.35
    aim = start + (end - start) * rng.uniform(0.65, 0.9) + rng.normal(0, 0.04 * distance, 2) if corrects else end
    skew, curvature = rng.uniform(0.8, 1.2), rng.normal(0, 0.05)
    delay, correction_s = duration * rng.uniform(0.6, 0.9), rng.uniform(0.22, 0.35)
    total = max(duration, delay + correction_s) if corrects else duration
    time = np.arange(1, int(np.ceil(total / PERIOD_S)) + 1) * PERIOD_S
    phase = np.clip(time / duration, 0, 1) ** skew
    along = aim - start
    across = np.array([-along[1], along[0]])
    path = start + _minimum_jerk(phase)[:, None] * along
    path = path + curvature * (16 * phase**2 * (1 - phase) ** 2)[:, None] * across
    if corrects:
        path = path + _minimum_jerk(np.clip((time - delay) / correction_s, 0, 1))[:, None] * (end - aim)
    return path


def _minimum_jerk(phase):
    """Share of the way covered at `phase` in [0, 1] (Flash & Hogan 1985)."""
    return 10 * phase**3 - 15 * phase**4 + 6 * phase**5


def _smooth_noise(rng, length: int, width: int, time_constant_s: float) -> np.ndarray:
    """Unit-variance Ornstein-Uhlenbeck noise, float64[length, width]."""
    keep = np.exp(-PERIOD_S / time_constant_s)
    shocks = rng.normal(size=(length, width)) * np.sqrt(1 - keep**2)
    shocks[0] = rng.normal(size=width)
    for t in range(1, length):
        shocks[t] += keep * shocks[t - 1]
    return shocks


def _latents(session) -> np.ndarray:
    """The latent state, float64[T, 14]: its groups and their sizes are the scales of `_rates`."""
    length = len(session["position"])
    time = np.arange(length) * PERIOD_S
    posture = session["position"] / 10.0
    # Preferred directions turn with the arm: about 30 degrees from one side of the workspace to the other.
    turn = 0.5 * posture[:, 0]
    ahead = session["velocity_ahead"]
    spun = (ahead[:, 0] + 1j * ahead[:, 1]) * np.exp(1j * turn)
    turned = np.stack([spun.real, spun.imag], axis=1)
    preparation, rotations, onset_signal = np.zeros((length, 2)), np.zeros((length, 4)), np.zeros((length, 1))
    events = zip(session["target_on"], session["onset"], session["displacement"], strict=True)
    for target_on, onset, displacement in events:
        span = slice(int(target_on / PERIOD_S), min(length, int((onset + 1.5) / PERIOD_S)))
        seen = np.clip(time[span] - target_on - 0.08, 0, None)
        moving = np.clip(time[span] - (onset - LEAD_S), 0, None)
        preparation[span] += ((1 - np.exp(-seen / 0.06)) * np.exp(-moving / 0.06))[:, None] * displacement
        envelope = moving / 0.12 * np.exp(1 - moving / 0.12)
        onset_signal[span, 0] += envelope
        for plane, frequency_hz in enumerate((1.8, 0.9)):
            angle = 2 * np.pi * frequency_hz * moving
            x, y = displacement
            rotations[span, 2 * plane] += envelope * (x * np.cos(angle) - y * np.sin(angle))
            rotations[span, 2 * plane + 1] += envelope * (x * np.sin(angle) + y * np.cos(angle))
    speed = session["speed_ahead"][:, None]
    tonic = np.stack([posture[:, 0], posture[:, 1], posture[:, 0] * posture[:, 1]], axis=1)
    return np.concatenate([turned, speed, preparation, rotations, onset_signal, tonic], axis=1)


SCALES = np.repeat([0.8, 0.5, 0.9, 0.7, 0.6, 0.35], [2, 1, 2, 4, 1, 3])  # the order of `_latents`


def _rates(rng, latents, speed, gain, units: int) -> np.ndarray:
    """Firing rates in Hz, float64[T, U]: softplus of a random read-out, gain by speed and by state, saturation."""
    loadings = rng.normal(size=(latents.shape[1], units)) * SCALES[:, None]
    baseline_hz = np.exp(rng.normal(np.log(5.0), 0.6, units))
    threshold = rng.normal(0.3, 0.5, units)
    drive = np.logaddexp(0, latents @ loadings + threshold) / np.logaddexp(0, threshold)
    speed_gain = 1 + rng.uniform(0, 0.8, units) * np.clip(speed, 0, 2)[:, None]
    state_gain = np.exp(rng.uniform(0, 0.25, units) * gain)
    ceiling_hz = rng.uniform(40, 120, units)
    wanted = baseline_hz * drive * speed_gain * state_gain
    return ceiling_hz * (1 - np.exp(-wanted / ceiling_hz))


def _spikes(rng, rate_hz) -> np.ndarray:
    """Sorted spike times in seconds of a Poisson unit with a dead time, whose mean rate is still `rate_hz`.

    A dead time d lets through r / (1 + r d) of a Poisson process of rate r, so r is first multiplied by
    1 / (1 - rate d).
    """
    hazard = rate_hz / (1 - rate_hz * REFRACTORY_S)
    counts = rng.poisson(hazard * PERIOD_S)
    times = np.repeat(np.arange(len(counts)) * PERIOD_S, counts)
    times = np.sort(times + rng.uniform(0, PERIOD_S, len(times)))
    while True:
        close = np.diff(times, prepend=-np.inf) < REFRACTORY_S
        # Each pass removes only the first of several close spikes, because its follower may have been close only to it.
        close[1:] &= ~close[:-1]
        if not close.any():
            return times
        times = times[~close]
