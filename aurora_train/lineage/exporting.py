"""The chain of an export: that of its run, then what was exported, then the card that was made of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from aurora_train.lineage import begin, card, chain, publish
from aurora_train.lineage.following import catch_up
from aurora_train.lineage.verify import files_of_an_export
from aurora_train.run import Run


def complete(found, folder: Path, about: dict[str, Any], proof: dict[str, Any]) -> None:
    """Write the chain and the card into an export that has been written and proved.

    `found` is the loaded or opened run, or open model. `about`: what the card says of the export, beside what the
    chain of the run has: "format", "dtype", "what", "run", "recipe", "step", and any of "stored", "use", "base",
    "licence", "parts", "exceeded", "library_name", "pipeline_tag".
    """
    run, path = Run(found.run), folder / chain.NAME
    catch_up(run)
    if run.lineage.is_file():
        shutil.copyfile(run.lineage, path)
    else:  # an open model, or a run that was never trained here
        known = getattr(found, "provenance", None) or {}
        chain.add(path, [{
            "kind": "begin", "run": run.folder.name, "created": known.get("created"), "data": {},
            "code_sha256": known.get("code_sha256"), "versions": known.get("versions") or {},
            "recipe": {"name": None}, "parents": begin.published_parents(known),
        }])  # fmt: skip
    shown = publish.without_folders({"kind": proof["kind"], "says": proof["says"]})
    chain.add(path, [{"kind": "export", **about, "proof": shown, "files": files_of_an_export(folder)}])
    (folder / card.NAME).write_text(card.card(chain.read(path)), encoding="utf-8")
    chain.add(path, [{"kind": "card", "files": {card.NAME: chain.file_digest(folder / card.NAME)}}])
