"""`aurora recipes`: list the bundled recipes, show one, or copy one in order to edit it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from aurora_train import bundled
from aurora_train.cli.common import JsonOption, print_json
from aurora_train.config.find_recipe import bundled_recipe
from aurora_train.config.recipe_code import files_beside
from aurora_train.config.yaml import read_file, show_path
from aurora_train.errors import UserError

app = typer.Typer(
    help="List, show and copy the bundled recipes.", epilog="Example: aurora recipes copy language_model my_lab",
    no_args_is_help=True, rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A bundled recipe, as `aurora recipes list` prints it.")]


def _configs_of(recipe: str) -> dict[str, Path]:
    """The bundled configs of a recipe, and those they extend."""
    named = {name: read_file(path).value for name, path in bundled.configs().items()}
    chosen = {name for name, tree in named.items() if tree.get("recipe") == recipe}
    files = bundled.configs()
    bases = {(files[n].parent / tree["extends"]).resolve(): n for n, tree in named.items() if "extends" in tree}
    chosen |= {bases[files[name].resolve()] for name in list(chosen) if files[name].resolve() in bases}
    return {name: files[name] for name in sorted(chosen)}


@app.command("list", epilog="Example: aurora recipes list")
def list_(json: JsonOption = False):
    """List the bundled recipes and their configs."""
    rows = [
        {
            "recipe": name, "about": bundled.first_line(path),
            "configs": {config: bundled.first_line(file) for config, file in _configs_of(name).items()},
        }
        for name, path in bundled.recipes().items()
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['recipe']}: {row['about']}")
        for config, about in row["configs"].items():
            print(f"  {config}: {about}")


@app.command(epilog="Example: aurora recipes show language_model")
def show(name: Name):
    """Print the source of a bundled recipe, or a bundled config."""
    path = bundled.config_file(name) if name not in bundled.recipes() else None
    print((path or bundled_recipe(name)).read_text(encoding="utf-8"), end="")


@app.command(epilog="Example: aurora recipes copy language_model my_lab")
def copy(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Destination folder; created if it does not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are already there.")] = False,
):
    """Copy a recipe, the modules it imports and its configs. The copied configs use your copy of the recipe."""
    source = bundled_recipe(name)
    code = {source.name: source, **files_beside(source)}
    texts = {file: path.read_text(encoding="utf-8") for file, path in code.items()}
    for path in _configs_of(name).values():
        own = re.sub(rf"^recipe:\s*{re.escape(name)}\s*$", f"recipe: {source.name}", path.read_text(encoding="utf-8"),
                     flags=re.MULTILINE)
        texts[path.name] = own
    existing = [file for file in texts if (folder / file).exists()]
    if existing and not force:
        raise UserError(
            f"{', '.join(existing)} already exist{'s' if len(existing) == 1 else ''}", where=show_path(folder),
            hint="--force overwrites; or copy into another folder",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
            print(show_path(folder / file))
    except OSError as fault:
        raise UserError("cannot write there", where=show_path(folder), why=fault.strerror) from None
