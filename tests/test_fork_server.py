"""A child of a fork server is a process as a user's shell starts it."""

import signal
import subprocess

import fork_server
import pytest
import toy


def test_a_child_has_the_arguments_folder_and_pipes_of_its_call_and_says_as_much_as_a_new_process(aurora, tmp_path):
    (tmp_path / "nearly.yaml").write_text("")
    asked = ("check", "nearlyy.yaml")
    forked = aurora(*asked)
    new = subprocess.run(
        aurora.command(*asked), cwd=aurora.folder, env=aurora.environment(), capture_output=True, text=True
    )
    assert forked.returncode == new.returncode == 2 and "did you mean `nearly.yaml`" in new.stderr
    assert (forked.stdout, forked.stderr) == (new.stdout, new.stderr)


DRAWS = """
import random
import sys
import numpy as np
print(random.random(), np.random.random(), file=sys.stderr)
"""


def test_what_nobody_has_seeded_differs_from_child_to_child(aurora, tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    (tmp_path / "draws.yaml").write_text("recipe: draws.py\n")
    one, other = ([said for said in aurora("check", "draws.yaml").stderr.split() if said[:2] == "0."] for _ in "ab")
    assert len(one) == len(other) == 2 and one[0] != other[0] and one[1] != other[1]


def test_a_signal_and_a_timeout_reach_a_child(aurora, tmp_path):
    waits = {"environment": {"TOY_SIGNAL": "prepare:0:HANG"}}
    with aurora.start("train", toy.write(tmp_path), **waits) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == process.returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        aurora("train", "toy.yaml", timeout=0.05, **waits)


def test_settings_that_libraries_read_when_they_are_imported_have_a_server_of_their_own(aurora):
    one, other = aurora.environment(), aurora.environment(devices=2)
    place = {"JAX_PROCESS_ID": "1", "AURORA_CACHE": "elsewhere"}
    same, another = fork_server.read_at_import(one | place), fork_server.read_at_import(other)
    assert same == fork_server.read_at_import(one) != another
