"""`aurora compare`: several runs side by side, as text and on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, print_json

EXAMPLE = "aurora compare runs/first runs/second --open"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a folder of runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="The page (default: beside the first run).")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    json: JsonOption = False,
):
    """Compare runs: differences of their configs, scores, and curves of training and validation loss on one page."""
    from aurora_train.tools import compare

    comparison = compare.compare(runs)
    path = compare.write_page(comparison, out or Path(comparison.runs[0].row.folder).parent / "compare.html")
    if json:
        print_json({**compare.document(comparison), "page": str(path)})
    else:
        from aurora_train.tools.report_plan import plain_console

        compare.show(comparison, plain_console())
        print(path)
    if open_it:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())
