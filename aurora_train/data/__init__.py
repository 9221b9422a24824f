"""From files to batches: what a source may read (`find`, `readers`), and which examples of it a step takes (`order`).

A batch is a function of (seed, data_step) over files that never change.
"""
