"""Writes a run as a folder with a GGUF file, a Modelfile for Ollama, and the model card."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from aurora_train.files import write_atomically
from aurora_train.interop.export import write_folder
from aurora_train.interop.families.family import Family
from aurora_train.interop.gguf.modelfile import modelfile
from aurora_train.interop.gguf.write import write_gguf
from aurora_train.interop.hf import open_folder
from aurora_train.interop.placing import matched
from aurora_train.interop.proof import refuse_other_tensors
from aurora_train.interop.result import Result

log = logging.getLogger("aurora_train")


def write_gguf_folder(result: Result, folder: Path, dtype: str) -> Family:
    """Write a result into an empty folder in one of `write.FORMATS`. Returns the family as which it was written.

    It passes through a Hugging Face folder, so that there is one way from a run to names and settings that others
    know, in float32, so that each value is rounded once and the folder can be held to the run to the bit; the disk
    holds both for a while. Raises UserError as `write_folder`, `refuse_other_tensors` and `write_gguf` do.
    """
    between = folder / "hf"
    between.mkdir()
    family = write_folder(result, between, "float32")
    refuse_other_tensors(result, matched(open_folder(between)), "float32")
    source = dataclasses.replace(open_folder(between), licence=result.record["licence"])
    file = f"{result.record['run']}-{dtype}.gguf"
    for remark in write_gguf(source, folder / file, dtype, result.record["run"]):
        log.warning("%s", remark)
    write_atomically(folder / "Modelfile", modelfile(source, file))
    shutil.rmtree(between)
    return family
