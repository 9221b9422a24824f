"""Keys of earlier versions. A run folder names every key, so a run that such a version began still has them.

A key that asks for what is now always done is taken out; any other value is refused with the reason.
"""

from __future__ import annotations

from aurora_train.config import messages
from aurora_train.config.yaml import Tree
from aurora_train.errors import UserError

_FUSED, _FORMS = ("memory", "fuse_update"), ("train", "forms")
_OPERATIONS = ("linear", "cross_entropy", "norm", "activation", "units", "grad_norm")


def take_out(tree: Tree) -> None:
    """Take the keys of earlier versions out of a config's tree. UserError for a value that nothing heeds any more."""
    if tree.has(_FUSED):
        if tree.at(_FUSED) is not False:
            raise UserError(
                "the update within the backward pass has been removed", where=_place(tree, _FUSED),
                why="no gain was ever measured on a device (docs/log.md, 2026-11-30)",
                hint="remove the key, also from a run's config.yaml: its checkpoints continue with the ordinary update",
            )  # fmt: skip
        tree.remove(_FUSED)
    operations = tree.at(_FORMS) if tree.has(_FORMS) else None
    if isinstance(operations, dict):
        chosen = next((name for name, form in operations.items() if name not in _OPERATIONS or form != "auto"), None)
        if chosen is not None:
            raise UserError(
                "there is one switch for all operations now, `train.forms`", where=_place(tree, (*_FORMS, chosen)),
                why="no gain of one operation's form was ever measured",
                hint="train.forms: auto or plain; the kernel of attention is model.attention",
            )  # fmt: skip
        tree.remove(_FORMS)


def _place(tree: Tree, path: tuple) -> str:
    return messages.place(tree.mark(path, of_key=True), ".".join(map(str, path)))
