"""The launchers that a lab has, for real: ssh to a real sshd, and Open MPI."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from kit import Aurora, events, in_process, losses

from aurora_train.errors import UserError
from aurora_train.tools import launch as launching
from aurora_train.tools.launch import Host, status_of_all
from aurora_train.tools.network import choose_link, common_links

HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
LAUNCH = [sys.executable, "-m", "aurora_train", "launch"]


def environment(tmp_path) -> dict[str, str]:
    return Aurora(tmp_path, tmp_path / "cache").environment() | {"PYTHONPATH": HERE["PYTHONPATH"]}


# ---- what is quick


@pytest.mark.parametrize(
    ("statuses", "whole"),
    [([0, 0], 0), ([75, 75], 75), ([-9, 69], 69), ([69, -9], 69), ([2, 2], 2), ([69, 2], 2), ([1, 69, 69], 1),
     ([77, 75], 77), ([69, 69], 69)],
)  # fmt: skip
def test_the_first_that_failed_by_itself_gives_the_status(statuses, whole):
    assert status_of_all(statuses) == whole


def box(machine: str, *addresses: tuple[str, str]) -> dict:
    return {"machine": machine, "addresses": [["lo", "127.0.0.1", "255.0.0.0"],
                                              *([name, at, "255.255.255.0"] for name, at in addresses)]}  # fmt: skip


def test_only_networks_that_all_machines_share_are_measured():
    a, b = box("a", ("eth0", "10.1.1.1"), ("fast", "10.2.2.1")), box("b", ("en1", "10.2.2.2"), ("eth0", "10.3.3.1"))
    (link,) = common_links([a, b])
    assert (link.network, link.interfaces, link.addresses) == ("10.2.2.0/24", ["fast", "en1"], ["10.2.2.1", "10.2.2.2"])
    assert link.variables(1) == {"NCCL_SOCKET_IFNAME": "=en1"}
    assert [one.network for one in common_links([a, a])] == ["127.0.0.0/8"]
    docker = ("docker0", "172.17.0.1")  # the same address on every machine: it leads nowhere
    assert common_links([box("a", docker), box("b", docker)]) == []


def test_where_the_processes_shall_run_is_asked(capsys):
    assert in_process("launch", "quickstart") == 2
    assert "--processes-here N" in capsys.readouterr().err
    assert in_process("launch", "--hosts", "a,,b", "quickstart") == 2
    assert "a name is missing" in capsys.readouterr().err
    assert in_process("launch", "--hosts", "a,-oProxyCommand=touch x", "quickstart") == 2
    assert "`-oProxyCommand=touch x` is no machine's name" in capsys.readouterr().err


def test_the_config_is_read_before_a_machine_is_reached(capsys, monkeypatch):
    monkeypatch.setattr(launching, "Host", lambda *arguments: pytest.fail("a machine was reached"))
    assert in_process("launch", "--processes-here", "2", "quickstart", "optimizer.lrr=1") == 2
    assert "did you mean `lr`" in capsys.readouterr().err
    assert in_process("launch", "--hosts", "a,b", "quickstart", "--replann") == 2
    assert "--replann" in capsys.readouterr().err
    assert in_process("launch", "--processes-here", "2", "resume", "no/such/run") == 2
    assert "not a run folder" in capsys.readouterr().err


def test_processes_of_one_machine_divide_its_gpus():
    def shares(*boxes: tuple[str, int]) -> list[str | None]:
        hosts = [SimpleNamespace(index=index, facts={"machine": machine, "gpus": gpus})
                 for index, (machine, gpus) in enumerate(boxes)]  # fmt: skip
        return [launching._accelerators(hosts, host).get("JAX_LOCAL_DEVICE_IDS") for host in hosts]

    assert shares(("a", 8), ("b", 2), ("a", 8)) == ["0,1,2,3", None, "4,5,6,7"]
    assert shares(("a", 0), ("a", 0)) == [None, None]


# ---- ssh


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """The ssh command that reaches `box1` and `box2`, both this machine, through a sshd of our own."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(sshd) or not shutil.which("ssh"):
        pytest.skip("needs an ssh server (apt install openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
    )
    (folder / "config").write_text(
        f"Host box*\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user\n  LogLevel ERROR\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd"], stderr=subprocess.PIPE)
    assert b"listening" in server.stderr.readline().lower()
    yield f"ssh -F {folder}/config"
    server.terminate()
    server.communicate()


@pytest.mark.slow
def test_a_run_over_ssh_is_stopped_and_continued_by_one_command(ssh, tmp_path):
    toy.write(tmp_path)
    command = [*LAUNCH, "--hosts", "box1,box2", "--ssh", ssh, "toy.yaml", "train.steps=400", "--run", "r"]
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    for _ in range(2400):
        if (tmp_path / "r/metrics.jsonl").exists() and losses(tmp_path / "r"):
            break
        assert started.poll() is None, started.communicate()[1][-2000:]
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=240)
    assert started.returncode == 75, said[-2000:]
    assert "GB/s to the neighbour" in said and said.count("step 1/400") == 1  # the progress of one process
    assert (last := losses(tmp_path / "r")[-1][0]) < 400 and (tmp_path / "r/checkpoints" / str(last)).is_dir()
    again = [*LAUNCH, "--hosts", "box1,box2", "--ssh", ssh, "resume", "r", f"train.steps={last + 2}"]
    done = subprocess.run(again, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "r")[-1][0] == last + 2 and "finished at step" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hosts", "box1,nowhere.invalid"], "nowhere.invalid: cannot be reached by ssh"),
        (["--hosts", "box1,box2", "--python", "/no/such/python"], "box1: there is no such Python"),
        (["--hosts", "box1,box2", "--python", "/usr/bin/python3"], "box1: "),
        (["--hosts", "box1,box2", "--interface", "nosuch7"], "no network that all machines share on the interface"),
    ],
)
def test_a_machine_that_cannot_be_used_is_named(ssh, options, said, tmp_path):
    toy.write(tmp_path)
    command = [*LAUNCH, *options, "--ssh", ssh, "toy.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def wait_for_carriers(names):
    """Until both ends of each cable are running: the kernel notices that up to a second after the other end is up."""
    deadline = time.monotonic() + 30
    for name in names:
        for cable in ("slow", "fast"):
            while " UP " not in subprocess.run(["ip", "-n", name, "-br", "link", "show", cable],
                                               capture_output=True, text=True, check=True).stdout:  # fmt: skip
                assert time.monotonic() < deadline, (name, cable)
                time.sleep(0.05)


@pytest.mark.slow
def test_the_faster_of_two_networks_is_chosen_and_a_cut_one_is_named(tmp_path):
    """Two network namespaces stand for two machines, with a slow cable and a fast one between them."""
    names = [f"launch{os.getpid()}{letter}" for letter in "ab"]
    if os.geteuid() or not shutil.which("tc") or subprocess.run(["ip", "netns", "add", names[0]]).returncode:
        pytest.skip("needs root, iproute2 and network namespaces")
    shell = tmp_path / "ssh"
    shell.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nexec ip netns exec "$1" sh -c "$2"\n')
    shell.chmod(0o755)
    hosts = []
    try:
        lines = [f"netns add {names[1]}"]
        for net, cable in ((81, "slow"), (82, "fast")):
            lines.append(f"-n {names[0]} link add name {cable} type veth peer name {cable} netns {names[1]}")
            for number, name in enumerate(names, 1):
                lines += [f"-n {name} address add 10.{net}.0.{number}/24 dev {cable}", f"-n {name} link set {cable} up"]
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True)
        for name in names:
            shaped = f"-n {name} qdisc add dev slow root tbf rate 20mbit burst 64k latency 50ms"
            subprocess.run(["tc", *shaped.split()], check=True)
        wait_for_carriers(names)
        said: list[str] = []
        hosts = [Host(index, name, str(shell), sys.executable, str(tmp_path)) for index, name in enumerate(names)]
        for host in hosts:
            host.ask("describe")
        for host in hosts:
            host.facts = host.answer(60)
        link = choose_link(hosts, None, said.append)
        assert link.network == "10.82.0.0/24" and link.interfaces == ["fast", "fast"]
        assert "GB/s" in said[0] and "10.81.0.0/24" in said[0]
        subprocess.run(["ip", "-n", names[1], "route", "add", "blackhole", "10.82.0.1/32"], check=True)
        with pytest.raises(UserError, match="the machines cannot reach each other"):
            choose_link(hosts, "fast", said.append)
    finally:
        for host in hosts:
            host.close()
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


# ---- Open MPI


@pytest.mark.release
def test_a_run_started_by_mpirun(tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("needs Open MPI (apt install openmpi-bin)")
    toy.write(tmp_path)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "-np", "2", "--oversubscribe", sys.executable, "-m", "aurora_train", "train", "toy.yaml",
               "train.steps=6", "--run", "r"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path) | root, text=True, capture_output=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 x cpu in 2 processes" in done.stderr and events(tmp_path / "r", "finish")[-1]["step"] == 6


@pytest.mark.release
def test_a_process_whose_data_are_slow_is_named(tmp_path):
    config = toy.write(tmp_path)
    slow = """        with SLOW:  # readers may be several threads
            time.sleep(1.2 * (os.environ.get("JAX_PROCESS_ID") == "1"))
"""
    recipe = toy.RECIPE.replace("        self.taken += 1\n", f"        self.taken += 1\n{slow}")
    recipe = recipe.replace("import signal\n", "import signal\nimport threading\n").replace(
        "\n\nclass Model", "\n\nSLOW = threading.Lock()\n\n\nclass Model", 1
    )
    assert slow in recipe
    (tmp_path / "toy.py").write_text(recipe)
    command = [*LAUNCH, "--processes-here", "2", str(config), "train.steps=60", "--run", "r"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    named = [event for event in events(tmp_path / "r", "straggler") if event["what"] == "waits for its data"]
    assert len(named) == 1 and named[0]["process"].startswith("process 1 (")
    assert done.stderr.count("waits for its data") == 1
