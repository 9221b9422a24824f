"""Every bundled config, resolved, beside a golden copy: a hyper-parameter that moved shows as a diff.

Regenerate with `AURORA_GOLDEN=write python -m pytest tests/config/test_config_golden.py`, and read the diff.
"""

import os
import re
from pathlib import Path

import pytest
from kit import bundled_configs

from aurora_train import bundled
from aurora_train.config import dump, load

GOLDEN = Path(__file__).parent / "golden"
WRITING = os.environ.get("AURORA_GOLDEN") == "write"
REGENERATE = "AURORA_GOLDEN=write python -m pytest tests/config/test_config_golden.py"


def resolved(name):
    config = load(name)
    notes = [f"# derived {one.key}: {one.formula} ({one.source})\n" for one in config.derived]
    text = "".join(notes) + dump(config)
    return re.sub(r"/\S*/(\w+/[\w.-]+\.gguf)", r"site-packages/\1", text)  # where a model's package is installed


@pytest.mark.parametrize("name", bundled_configs())
def test_a_bundled_config_resolves_to_its_golden_copy(name):
    golden = GOLDEN / f"{name.replace('/', '-')}.yaml"
    if WRITING:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(resolved(name), encoding="utf-8")
    assert golden.exists(), f"no golden copy yet: {REGENERATE}"
    assert resolved(name) == golden.read_text(encoding="utf-8"), f"if the change is meant: {REGENERATE}"


def test_every_golden_copy_belongs_to_a_config():
    known = {name.replace("/", "-") for name in bundled.configs()}
    assert {path.stem for path in GOLDEN.glob("*.yaml")} <= known


@pytest.mark.parametrize("name", bundled.configs())
def test_a_bundled_config_opens_with_a_comment(name):
    assert bundled.first_line(bundled.configs()[name])
