"""Sources -> prepared store -> order -> batches.

A batch is a function of (seed, data_step) over files that never change.
"""
