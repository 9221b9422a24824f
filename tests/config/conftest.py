"""A tiny recipe and config written into a folder, which becomes the current one: what most config tests start from."""

import pytest

RECIPE = '''"""A tiny recipe for tests."""
from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.recipe import Derived, Recipe


class Model(Section):
    size: str | None = setting(None, help="the dial")
    width: int = setting(8, ge=1, help="features")
    heads: int = setting(2, ge=1, help="attention heads")


class Data(Section):
    path: str = setting(..., help="where the data is")
    mixture: dict[str, float] = setting({}, help="share of each source")
    shape: tuple[int, int] = setting((1, 2), help="rows and columns")


class Tiny(Recipe):
    class Config(Section):
        model: Model = Model()
        data: Data

    @classmethod
    def derive(cls, given):
        size = given.get("model", {}).get("size")
        if size is None:
            return []
        depth = int(size.removeprefix("d"))
        return [
            Derived("model.width", 64 * depth, "64 x depth", "nanochat"),
            Derived("optimizer.schedule.warmup", 10 * depth, "10 x depth", "ours"),
        ]

    @classmethod
    def check(cls, config):
        if config.model.width % config.model.heads:
            raise UserError(
                f"{config.model.heads} heads do not divide a width of {config.model.width}", where="model.heads"
            )
'''

CONFIG = """# a tiny config
recipe: tiny.py
data: {path: somewhere}
train:
  steps: 10
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(RECIPE)
    (tmp_path / "a.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path
