"""`aurora schema`: the JSON Schema of a config, so that an editor completes keys and shows their units."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import print_json
from aurora_train.config import Config, config_class, json_schema
from aurora_train.config.find_recipe import find_recipe

EXAMPLE = "aurora schema language_model > language_model.schema.json"

RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help="A bundled recipe or a .py file; without it, the trainer's own sections."),
]


def command(recipe: RecipeArgument = None):
    """Print the JSON Schema of a recipe's configs; each field says what a resume may do with it."""
    if recipe is None:
        schema = json_schema(Config)
        schema["additionalProperties"] = True  # the sections that a recipe will add
    else:
        path = Path(recipe)
        found_recipe = find_recipe(path.name if path.suffix == ".py" else recipe, path.parent)
        schema = json_schema(config_class(found_recipe.cls))
    print_json(schema)
