"""What surrounds training and is not read to understand it: lists of runs, comparisons, sweeps."""
