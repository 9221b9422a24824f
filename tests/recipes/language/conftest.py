"""Processes that these tests start find the kit and the tests' own modules where the tests find them."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
