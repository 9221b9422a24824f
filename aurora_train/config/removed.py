"""Keys of earlier versions. A run folder names every key, so a run that such a version began still has them.

A key that asks for what is now always done is taken out; any other value is refused with what replaces it.
"""

from __future__ import annotations

from aurora_train.config import messages
from aurora_train.config.yaml import Tree
from aurora_train.errors import UserError

# path -> (the value that asks for nothing, why the key is gone, what replaces it)
_REMOVED = {
    ("log", "online"): (False, "it concerned one sink only, which names it now", "log.sinks=[wandb-online]"),
}


def take_out(tree: Tree) -> None:
    """Take the keys of earlier versions out of a config's tree. UserError for a value that nothing heeds any more."""
    for path, (idle, why, hint) in _REMOVED.items():
        if not tree.has(path):
            continue
        key = ".".join(path)
        if tree.at(path) is not idle:
            where = messages.place(tree.mark(path, of_key=True), key)
            raise UserError("this key has been removed", where=where, why=why, hint=hint)
        tree.remove(path)
