"""A user adds a machine in a file of their own, and a wrong entry is refused with its place and the nearest."""

import re
from pathlib import Path

import pytest

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.machine.rates import assumed
from aurora_train.machine.table import known_machines, lookup
from aurora_train.machine.targets import find_machine, machine_names

DOC = Path(__file__).parents[2] / "docs" / "memory.md"
EXAMPLE = re.search(r"```toml\n(# machines.toml\n.*?)```", DOC.read_text(), re.DOTALL)[1]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the user's file of machines."""
    monkeypatch.setenv("AURORA_MACHINES", str(tmp_path / "mine.toml"))
    return (tmp_path / "mine.toml").write_text


def test_the_documents_machine_is_recognised_and_planned_for_as_ours_are(own):
    own(EXAMPLE)
    target = find_machine("lab-gpu")
    assert target == find_machine("NVIDIA Lab GPU") and machine_names()[-1] == "lab-gpu"
    assert target.row == lookup("NVIDIA Lab GPU X") and lookup("NVIDIA H200").name == "H200"
    assert target.budget_bytes == int(0.92 * 33.6e9) and target.compute_capability == (12, 0)
    assert "core_count: 120\n" in target.config_text and "threads_per_core_limit: 1536\n" in target.config_text
    assert target.row.link == find_machine("h200").row.link
    assert assumed(target.row).matmul["bfloat16"] == 0.6 * 160e12


def test_without_the_variable_the_file_lies_among_the_users_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("AURORA_MACHINES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "lab-gpu" not in known_machines()
    (tmp_path / ".config" / "aurora_train").mkdir(parents=True)
    (tmp_path / ".config" / "aurora_train" / "machines.toml").write_text(EXAMPLE)
    assert "lab-gpu" in known_machines()


def test_an_entry_of_our_name_replaces_ours_and_a_laptops_part_can_be_described(own):
    own(EXAMPLE.replace("lab-gpu", "rtx-4090").replace('"Lab GPU"', '"RTX 4090"')
        + EXAMPLE.replace("lab-gpu", "rtx-4090-laptop").replace('"Lab GPU"', '"RTX 4090 Laptop"'))
    assert lookup("NVIDIA GeForce RTX 4090").memory.value == 32e9
    assert lookup("NVIDIA GeForce RTX 4090 Laptop GPU") == known_machines()["rtx-4090-laptop"]


@pytest.mark.parametrize("written, wrong, said", [
    ("gb_per_s = 1500", "gb_per_sec = 1500", "machine.lab-gpu.gb_per_sec: unknown key; did you mean `gb_per_s`?"),
    ("memory_gb = 32", 'memory_gb = "32"', "machine.lab-gpu.memory_gb: must be a number; got \"32\""),
    ("bfloat16 = 160, ", "", "machine.lab-gpu.tflops.bfloat16: is required"),
    ("fp8 = 320", "fp_8 = 320", "machine.lab-gpu.tflops.fp_8: unknown key; did you mean `fp8`?"),
    ('"pcie5"', '"pcie6"', "machine.lab-gpu.link: unknown link `pcie6`"),
    ('link = "pcie5"\n', "", "machine.lab-gpu: needs either `link`, or `unified = true`"),
    ('"12.0"', '"13.0"', "machine.lab-gpu.chip: the limits of compute capability 13.0 are not known here"),
    ('"12.0"', "12.0", "machine.lab-gpu.chip.capability: must be text"),
    ("value = 0.6", "value = 60", "machine.lab-gpu.reached.value: must be a share of 1, not percent"),
    ("value = 0.6", "value = 60", "got 60; did you mean 0.6?"),
    ("memory_gb = 32", "memory_gb = 34_359_738_368", "machine.lab-gpu.memory_gb: must be GB (10^9 bytes)"),
    ("gb_per_s = 1500", "gb_per_s = 1.5e12", "got 1.5e+12; did you mean 1,500?"),
    ("bfloat16 = 160", "bfloat16 = 160e12", "machine.lab-gpu.tflops.bfloat16: must be TFLOP/s"),
    ("value = 33.6e9", "value = 33.6", "did you mean 3.36e+10?"),
    ('link = "pcie5"', 'link = { value = 64, source = "" }', "machine.lab-gpu.link.value: must be bytes"),
    ("clock_ghz = 2.4", "clock_ghz = 2400", "chip.clock_ghz: must be GHz, not MHz, from 0.1 to 10; got 2,400; did you"),
    ("l2_bytes = 67_108_864", "l2_bytes = 96", "machine.lab-gpu.chip.l2_bytes: must be bytes, not MB"),
    ('sees = { value = 33.6e9, source = "nvidia-smi" }', "", "machine.lab-gpu: `chip` needs `sees` beside it"),
    ("[machine.lab-gpu]", "[machine.Lab_GPU]", "[machine.lab-gpu]"),
    ("[machine.lab-gpu]", "[machines.lab-gpu]", "machines: unknown key; did you mean `machine`?"),
    ("kinds = [", "kinds [", "cannot be read as TOML"),
])  # fmt: skip
def test_a_wrong_entry_is_refused_with_file_key_and_the_nearest(own, written, wrong, said, capsys):
    own(EXAMPLE.replace(written, wrong, 1))
    with pytest.raises(UserError) as error:
        known_machines()
    assert "mine.toml: " in str(error.value) and said in str(error.value), str(error.value)
    assert main(["plan", "quickstart", "--machine", "lab-gpu"]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(own):
    with pytest.raises(UserError, match="mine.toml: there is no such file of machines"):
        known_machines()
