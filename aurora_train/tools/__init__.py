"""What surrounds training and is not read to understand it: the doctor, calibration, capacity tables, profiles, systemd
units, reports, lists of runs, comparisons, sweeps."""
