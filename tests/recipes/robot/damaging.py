"""Edits of a LeRobot dataset's files, for tests of what a reader says of them."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from robot.lerobot_meta import INFO, TASKS

DATA, TABLE = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
FILM = "videos/observation.images.top/chunk-000/file-000.mp4"
TOP = "observation.images.top"


def info(**changes):
    """Changes keys of info.json; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / INFO).read_text()) | changes
        (folder / INFO).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def feature(name: str, **changes):
    """Changes a feature's description in info.json; `away=True` removes it."""

    def damage(folder: Path) -> None:
        features = json.loads((folder / INFO).read_text())["features"]
        if changes.get("away"):
            del features[name]
        else:
            features[name] |= changes
        info(features=features)(folder)

    return damage


def cell(file: str, row: int, column: str, value):
    """Another value in one cell of a table."""
    return rows(file, lambda found: found[row].update({column: value}))


def rows(file: str, edit):
    """Edits the list of a table's rows in place."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / file)
        found = table.to_pylist()
        edit(found)
        pq.write_table(pa.Table.from_pylist(found, schema=table.schema), folder / file)

    return damage


def column(file: str, name: str, values=None):
    """Another column in place of one, from `values(list)`; without it the column is left out."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / file)
        at = table.column_names.index(name)
        kept = table.drop_columns([name])
        pq.write_table(kept if values is None else kept.add_column(at, name, values(table[name].to_pylist())),
                       folder / file)  # fmt: skip

    return damage


def without(file: str):
    """A file or folder that is not there."""

    def damage(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(file: str, share: float = 0.6):
    """A file that was not copied to its end."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return damage


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def tasks_without_index(folder: Path) -> None:
    table = pq.read_table(folder / TASKS)
    pq.write_table(table.replace_schema_metadata(None), folder / TASKS)


def tasks_described_as(pandas: str):
    """Another description of the table by pandas."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / TASKS)
        pq.write_table(table.replace_schema_metadata({b"pandas": pandas.encode()}), folder / TASKS)

    return damage


def tasks_as_a_column(folder: Path) -> None:
    """What pandas writes if the instructions were not made its index."""
    import pandas as pd

    pd.read_parquet(folder / TASKS).reset_index().to_parquet(folder / TASKS)
