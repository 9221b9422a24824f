"""The page of `aurora watch`: the runs of a folder, drawn from their files while they train. It reads and never writes.

What a request may cost is bounded: logs are read on from where the last request ended, for at most some tenths of a
second, and what is not read yet comes with the next refresh.
"""
