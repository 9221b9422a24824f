"""What a plan predicts is held to what the compiler makes of a step as a run has it: nothing here compiles quickly."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.optimized)
