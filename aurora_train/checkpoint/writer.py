"""Orbax as our checkpoints use it: its settings, and leaves that are read while they are written.

Orbax takes the leaves of a tree as numpy arrays, all at once. Here it may also be given `layout.Unread` leaves, which a
handler reads a piece at a time: it writes a piece, and lets go of it before it reads the next. So no copy of them all
is made. What is on disk is the same.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from pathlib import Path

import numpy as np

from aurora_train.checkpoint.layout import Unread
from aurora_train.checkpoint.save_failed import silence_closed_loops
from aurora_train.machine import processes

PIECE_BYTES = 256 * 2**20  # read before it is written; a larger leaf is a piece of its own
STATE = "state"  # Orbax's name for what a checkpoint holds
# Orbax measures its timeout of 20 minutes by the wall clock, which may jump; the watchdog ends a save that hangs.
_NEVER_S = 10 * 365 * 86_400


def checkpointer(folder: Path):
    """Orbax's Checkpointer for a folder. It keeps every checkpoint: retention is ours."""
    silence_closed_loops()
    from orbax.checkpoint import v1 as ocp

    context = options()
    keep_all = ocp.training.preservation_policies.PreserveAll()
    return ocp.training.Checkpointer(folder, context=context, preservation_policy=keep_all)


def options():
    """An Orbax Context for our checkpoints, which are dicts of numpy arrays and of `layout.Unread` leaves."""
    from orbax.checkpoint import v1 as ocp

    for name in ("absl", "asyncio"):  # these loggers print tracebacks of errors that Orbax also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = ocp.Context()
    context.asynchronous.timeout_secs = _NEVER_S
    # If a folder cannot be created in the background, Orbax's threads wait for it forever, even at exit.
    context.asynchronous.create_directories_asynchronously = False
    if not processes.leads():  # else only process 0 would create folders; each has its own
        context.multiprocessing.primary_host = None
    context.array.saving.use_compression = False  # ten times the save time for 8 % of the size
    context.memory.deepcopy_host_arrays = False  # they are copies already
    registry = ocp.handlers.local_registry(include_global_registry=False)
    registry.add(_tree_handler(), checkpointable_name=STATE)
    context.checkpointables.registry = registry
    return context


@cache
def _tree_handler() -> type:
    """Orbax's handler of trees, which also takes Unread leaves."""
    from orbax.checkpoint import v1 as ocp

    standard = ocp.handlers.PyTreeHandler()._leaf_handler_registry  # no release exports the handlers of leaves yet
    array_handler = standard.get(np.ndarray)

    class ReadInPieces(array_handler):
        async def serialize(self, params, context):
            async def write():
                for piece in pieces(params):
                    held = [dataclasses.replace(one, value=one.value.read()) for one in piece]
                    await (await array_handler.serialize(self, held, context))
                    del held  # before the next piece is read

            return write()

    class TreeHandler(ocp.handlers.PyTreeHandler):
        def __init__(self, *, context=None):
            leaves = type(standard)()
            leaves.add(Unread, Unread, ReadInPieces, secondary_typestrs=["np.ndarray"])  # how they are on disk
            super().__init__(context=context, leaf_handler_registry=leaves)

    # A checkpoint names its handler by module and class. Anyone's Orbax reads ours with its own handler.
    TreeHandler.__module__ = ocp.handlers.PyTreeHandler.__module__
    TreeHandler.__qualname__ = ocp.handlers.PyTreeHandler.__qualname__
    return TreeHandler


def pieces(params: list):
    """Consecutive leaves (`.value.nbytes`) in lists of at most PIECE_BYTES, or of one larger leaf."""
    piece, held = [], 0
    for one in params:
        if piece and held + one.value.nbytes > PIECE_BYTES:
            yield piece
            piece, held = [], 0
        piece.append(one)
        held += one.value.nbytes
    yield piece
