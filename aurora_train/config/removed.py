"""Keys of earlier versions. A run folder names every key, so a run that such a version began still has them.

A key that asks for what is now always done is taken out; any other value is refused with what replaces it, unless the
run is only read.
"""

from __future__ import annotations

from aurora_train.config import messages
from aurora_train.config.yaml import Tree
from aurora_train.errors import UserError

_FORMS, _ONLINE, _SINKS = ("train", "forms"), ("log", "online"), ("log", "sinks")
_OPERATIONS = ("linear", "cross_entropy", "norm", "activation", "units", "grad_norm")
# path -> (the value that asks for nothing, what is gone, why, what replaces it)
_REMOVED = {
    ("memory", "fuse_update"): (
        False, "the update within the backward pass has been removed",
        "no gain was ever measured on a device (docs/log.md, 2026-11-30)",
        "remove the key, also from a run's config.yaml: its checkpoints continue with the ordinary update",
    ),
    _ONLINE: (
        False, "this key has been removed", "it concerned one sink only, which names it now", "log.sinks=[wandb-online]"
    ),
}  # fmt: skip


def is_idle(path: tuple, value) -> bool:
    """Whether a key of an earlier version has a value that asks for nothing."""
    return path in _REMOVED and (value is None or value is _REMOVED[path][0])


def take_out(tree: Tree, *, reading: bool = False) -> None:
    """Take the keys of earlier versions out of a config's tree.

    UserError for a value that no longer has an effect, unless the config is that of a run that is only read.
    """
    _name_online_sink(tree)
    for path, (_, what, why, hint) in _REMOVED.items():
        if tree.has(path):
            if not (reading or is_idle(path, tree.at(path))):
                raise UserError(what, where=_place(tree, path), why=why, hint=hint)
            tree.remove(path)
    operations = tree.at(_FORMS) if tree.has(_FORMS) else None
    if isinstance(operations, dict):
        chosen = next((name for name, form in operations.items() if name not in _OPERATIONS or form != "auto"), None)
        if chosen is not None and not reading:
            raise UserError(
                "there is one switch for all operations now, `train.forms`", where=_place(tree, (*_FORMS, chosen)),
                why="no gain of one operation's form was ever measured",
                hint="train.forms: auto or plain; the kernel of attention is model.attention",
            )  # fmt: skip
        tree.remove(_FORMS)


def _name_online_sink(tree: Tree) -> None:
    """Write `sinks: [wandb-online]` for `sinks: [wandb]` with `online: true`, which meant the same."""
    online, sinks = (tree.at(path) if tree.has(path) else None for path in (_ONLINE, _SINKS))
    if online is True and isinstance(sinks, list) and "wandb" in sinks:
        sinks[sinks.index("wandb")] = "wandb-online"
        tree.remove(_ONLINE)


def _place(tree: Tree, path: tuple) -> str:
    return messages.place(tree.mark(path, of_key=True), ".".join(map(str, path)))
