"""The report's section of lineage: the tree, as `aurora lineage` draws it."""

from __future__ import annotations

from aurora_train.errors import UserError
from aurora_train.lineage import drawing
from aurora_train.run import Run
from aurora_train.tools.report_page import escape, section


def lineage_section(run: Run) -> str:
    """The section; "" for a run from before runs had a lineage."""
    if not run.lineage.exists():
        return ""
    try:
        drawn = "\n".join(drawing.tree(drawing.document(run.folder)))
    except (UserError, KeyError, IndexError) as fault:  # an edited chain, which `aurora lineage --verify` reports
        drawn = f"{run.lineage.name} cannot be read: {fault}"
    return section("Lineage", f"<pre>{escape(drawn)}</pre>")
