"""Whether a policy fits the world that it is to act in, and the data on which its training goes on."""

from __future__ import annotations

from aurora_train.errors import UserError, nearest
from robot.chunks import CAMERA
from robot.worlds import Seen, world

_HINT = "score it in the world of its demonstrations"


def opened(known: dict, name: str) -> tuple[Seen, int]:
    """The world `name` as a policy with the facts `known` sees it, and the edge of its pictures, 0 without cameras."""
    cameras = known["cameras"]
    size = known["shapes"][cameras[0]][0] if cameras else 0
    return world(name, cameras, size), size


def refuse_other(known: dict, name: str) -> None:
    """What `refuse` raises, for the world `name`: before any training, rather than at its end."""
    on, _ = opened(known, name)
    try:
        refuse(known, on)
    finally:
        on.close()


def refuse(known: dict, on: Seen) -> None:
    """UserError if the world's observations, actions, rate or instruction are not those of the training data."""
    seen = on.reset(0) | on.pictures()
    for name in known["state"]:
        wanted, there = tuple(known["shapes"][name]), seen[name].shape if name in seen else None
        if there != wanted:
            shown = f"{there[0]} entries of `{name}`" if there else f"no `{name}`"
            raise _other(f"the world shows {shown}, and the policy was trained on {wanted[0]}")
    for camera in known["cameras"]:
        wanted, there = tuple(known["shapes"][camera]), seen[CAMERA + camera].shape
        if there != wanted:
            raise _other(f"the world shows pictures of {there[0]} x {there[1]} pixels, and the policy was trained on "
                         f"{wanted[0]} x {wanted[1]} of `{camera}`", "data.image=64 makes all pictures squares of one "
                         "size")  # fmt: skip
    if (there := on.action_low.shape) != (wanted := tuple(known["shapes"]["action"])):
        raise _other(f"an action has {there[0]} entries in this world and {wanted[0]} in the demonstrations")
    if abs(on.fps - known["fps"]) > 1e-6 * on.fps:
        raise _other(f"the world has {on.fps:g} frames per second and the demonstrations {known['fps']:g}, so each "
                     "action would be held for another time",
                     "record the demonstrations at the world's rate")  # fmt: skip
    if len(tasks := known["tasks"]) > 1 and on.task not in tasks:
        raise _other(f"the policy does not know the task {on.task!r}",
                     nearest(on.task, tasks, f"it knows: {', '.join(map(repr, tasks))}"))  # fmt: skip


def continued(mine: dict, inherited: dict, language: str | None) -> dict:
    """The facts of a run: its own, with the scale and the instructions of the run that it starts from, if there is one.

    Several new instructions are read by the model `language`, where one is named.

    UserError for a feature that the other run does not know, or knows with another size, and for a language model
    where it has none.
    """
    scale = inherited.get("scale")
    for name in mine["scale"] if scale else ():
        if name not in scale:
            raise UserError(f"the policy that this run starts from does not know `{name}`", where="data",
                            hint=f"it knows: {', '.join(scale)}")  # fmt: skip
        sizes = [len(one[name]["mean"]) for one in (mine["scale"], scale)]
        if sizes[0] != sizes[1]:
            raise UserError(f"`{name}` has {sizes[0]} entries, and {sizes[1]} in the run that this one starts from",
                            where="data", hint="train from the beginning: leave `init` out")  # fmt: skip
    if language is not None and len(inherited.get("tasks", mine["tasks"])) > 1 and "instructions" not in inherited:
        if "tasks" in inherited:
            raise UserError("the run that this one starts from reads instructions as hashed words",
                            where="data.language", hint="leave it out, or leave `init` out")  # fmt: skip
        from robot.instruction import encoded

        mine["instructions"] = encoded(language, mine["tasks"])
    return mine | {name: inherited[name] for name in ("scale", "tasks", "instructions") if name in inherited}


def _other(what: str, hint: str = _HINT) -> UserError:
    return UserError(what, where="score.world", hint=hint)
