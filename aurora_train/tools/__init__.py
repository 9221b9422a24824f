"""Tools around training, which nobody needs to read to understand it: the doctor, calibration, capacity tables,
profiles, systemd units, reports, lists of runs, comparisons, sweeps."""
