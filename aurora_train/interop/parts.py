"""The tensors of a vision checkpoint that the text model does not have (`visual.*`, `mtp.*`), copied into an export.

A run keeps the text model alone. Its export to a Hugging Face folder takes the other tensors from the source that the
provenance names, bit for bit, if its files are still those with which the run began: then the export is a checkpoint of
the source's architecture, with its names and its config. Otherwise they are left out, and the card says why.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from aurora_train.errors import UserError
from aurora_train.interop import families
from aurora_train.interop.kept import ORIGIN
from aurora_train.interop.peft import CONFIG, base_of
from aurora_train.interop.placing import Opened, matched
from aurora_train.interop.result import Result, lineage
from aurora_train.interop.source import Tensor, digest, open_source, same_bits

log = logging.getLogger("aurora_train")
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_OURS = ("model_type", "architectures")  # of the text model; the export is of the whole


class Parts(NamedTuple):
    """What an export takes from the source beside the text model.

    Attributes:
        tensors: by the source's names, as they are stored.
        names: the source's name of each tensor of the text model, by the family's name.
        config: the source's config.json.
        folder: where the source lies; of an adapter, its base.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    config: dict[str, Any]
    folder: Path

    def merged(self, ours: dict[str, Any]) -> dict[str, Any]:
        """The source's config.json with the text model's keys `ours` in their place."""
        inner = families.text_config(self.config)
        if inner is self.config:
            return self.config | ours
        text = self.config["text_config"] | {key: value for key, value in ours.items() if key != "architectures"}
        outer = {key: ours[key] for key in self.config if key in ours and key not in _OURS}
        dtypes = {key: ours[key] for key in ("dtype", "torch_dtype")}
        return self.config | outer | dtypes | {"text_config": text}

    def copy_files(self, folder: Path) -> None:
        """Copy the settings of the image and video processors, if the source has them."""
        for name in _FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def with_parts(result: Result, *, fits: str | None = None) -> Result:
    """A result with the parts of its source that its model lacks; the sentence for the card is `record["parts"]`.

    `fits`: why the format cannot hold them; None if it can. A result whose source was a text model is returned as it
    is. What is left out is said by a warning as well.
    """
    number, first = (result.facts.get(ORIGIN) or {}).get("beside") or (0, "")
    if not number:
        return result
    named = f"{number} tensors of other parts of its base ({first}, ...)"
    parts, fault = (None, fits) if fits else _found(result)
    if fault:
        log.warning("%s are left out: %s", named, fault)
        said = f"{named} were left out: {fault}."
    else:
        said = f"{named} were copied from it as they were."
    return result._replace(parts=parts, record=result.record | {"parts": said})


def _found(result: Result) -> tuple[Parts | None, str | None]:
    """(the parts, None), or (None, why there are none)."""
    *_, first = [*lineage(result.record["parent"])] or [None]
    if first is None or first["step"] is not None:
        return None, "the provenance names no source that has them"
    source = Path(first["from"])
    try:
        same = digest(source) == first["digest"] if source.exists() else None
        folder = base_of(source) if (source / CONFIG).is_file() else source
    except UserError:  # the base of an adapter is gone
        same = None
    if same is None:
        return None, f"{source.name} is no longer where the run began with it"
    if not same:
        return None, f"the files of {source.name} are no longer those with which the run began"
    opened = matched(open_source(source))
    tensors = {name: opened.source.tensors[name] for name in opened.beside}
    names = {opened.family.meant(name): name for name in opened.source.tensors if name not in tensors}
    return Parts(tensors, names, opened.source.config, folder), None


def refuse_other_copies(parts: Parts, opened: Opened) -> None:
    """UserError unless an export holds each copied tensor to the bit."""
    for name, tensor in parts.tensors.items():
        copy = opened.source.tensors.get(name)
        if copy is None or not same_bits(copy.whole(), tensor.whole()):
            raise UserError(f"the tensor {name} does not read back as it was copied", where=str(opened.source.path))
