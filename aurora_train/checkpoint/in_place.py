"""Writes leaves while they are still where they were computed, a piece at a time, so that no copy of them all is made.

Orbax takes the leaves of a tree as numpy arrays, all at once. Here it is given `layout.Unread` leaves and a handler
that reads a piece of them, writes it, and lets go of it before it reads the next. What is on disk is the same.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np

from aurora_train.checkpoint.layout import Unread

PIECE_BYTES = 256 * 2**20  # read before it is written; a larger leaf is a piece of its own
STATE = "state"  # Orbax's name for what a checkpoint holds


def options():
    """An Orbax Context for our checkpoints, which are dicts of numpy arrays and of `layout.Unread` leaves."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
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
