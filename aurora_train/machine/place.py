"""Which process of a run this is, by what started it: the variables of `aurora launch`, Slurm, Open MPI 4 or 5.

Every way ends in the same three facts: the number of this process, how many there are, and where process 0 waits for
the others. Nothing here imports jax.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from aurora_train.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_FIRST_PORT, _PORTS = 61440, 4096  # above the ports that Linux gives to connections; jax takes the same ones


class Place(NamedTuple):
    """The index of this process, the number of processes, and HOST:PORT of process 0: the first that answers counts.

    `job` is what all processes of one start share and others do not, if the launcher provides such a thing.
    """

    index: int
    count: int
    addresses: tuple[str, ...] = ()
    job: str = ""


def set_place(coordinator: str | None, process: int | None, processes: int | None) -> None:
    """Set this process's place as the options of a command give it. UserError if only a part of it is given."""
    given = {"--coordinator": coordinator, "--process": process, "--processes": processes}
    lacking = [option for option, value in given.items() if value is None]
    if len(lacking) == len(given):
        return
    if lacking:
        raise UserError(
            f"{' and '.join(lacking)} not given", where="command line",
            why="--coordinator, --process and --processes belong together",
            hint="--coordinator HOST:PORT --process I --processes N, with HOST that of process 0",
        )  # fmt: skip
    os.environ.update({ADDRESS: coordinator, INDEX: str(process), COUNT: str(processes)})


def place(environ=None) -> Place:
    """This process's place by the environment; Place(0, 1) if it is alone. UserError if settings are missing."""
    environ = os.environ if environ is None else environ
    if COUNT in environ or INDEX in environ:
        found = _by_hand(environ)
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environ:
        found = _of_slurm(environ)
    elif environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" and "OMPI_COMM_WORLD_RANK" in environ:
        found = _of_open_mpi(environ)
    else:
        return Place(0, 1)
    for address in found.addresses:
        _refuse_no_port(address)
    return found if found.count > 1 else Place(0, 1)


def _refuse_no_port(address: str) -> None:
    port = address.rpartition(":")[2]
    if ":" not in address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS}={address} has no port", where="environment", hint="HOST:PORT")


def local_devices(environ=None) -> list[int] | None:
    """The numbers of the devices that this process drives; None for all that it sees.

    A launcher that starts several processes on a box means one accelerator for each.
    """
    environ = os.environ if environ is None else environ
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    if "1" in (slurm, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")):
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if COUNT in environ or visible is not None and "," not in visible:  # the launcher has given it its own
        return None
    local = environ.get("SLURM_LOCALID" if slurm else "OMPI_COMM_WORLD_LOCAL_RANK")
    return None if local is None else [int(local)]


def _by_hand(environ) -> Place:
    lacking = [name for name in (ADDRESS, COUNT, INDEX) if not environ.get(name)]
    if lacking:
        raise UserError(
            f"{' and '.join(lacking)} not set", where="environment",
            why=f"{ADDRESS}, {COUNT} and {INDEX} belong together",
            hint=f"set all three (address HOST:PORT of process 0), or unset {COUNT} and {INDEX} to train alone",
        )  # fmt: skip
    address = environ[ADDRESS]
    given = Place(_whole(environ, INDEX), _whole(environ, COUNT), (address,), environ.get("AURORA_JOB", ""))
    if not 0 <= given.index < given.count:
        raise UserError(
            f"{INDEX}={given.index} of {COUNT}={given.count}", where="environment", why="processes are numbered from 0"
        )
    return given


def _of_slurm(environ) -> Place:
    """The first of the step's hosts has process 0; the port follows from the job, as jax has it, and the step."""
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    addresses = (environ[ADDRESS],) if ADDRESS in environ else ()
    if not addresses:
        first = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        if not first:
            raise UserError("SLURM_STEP_NODELIST is not set", where="environment", hint="start with srun")
        port = _FIRST_PORT + (_number(job) + _number(step)) % _PORTS
        addresses = (f"{first}:{port}",)
    count = _whole(environ, "SLURM_STEP_NUM_TASKS")
    return Place(_whole(environ, "SLURM_PROCID"), count, addresses, f"slurm {job}.{step}")


def _first_host(nodes: str) -> str:
    """The first name of Slurm's list: "node[001-003,7]-ib,other" -> "node001-ib"."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups())


def _of_open_mpi(environ) -> Place:
    """Process 0 is where `mpirun` was started; Open MPI 4 gives its addresses, 5 the name of its host."""
    index, size = _whole(environ, "OMPI_COMM_WORLD_RANK"), _whole(environ, "OMPI_COMM_WORLD_SIZE")
    uri, space = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    if uri:  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
        job, number = uri.partition(".")[0], _number(uri) >> 12  # the lowest 12 bits are always zero
        found = re.search(r"tcp://([^:;]+)|tcp6://\[([^\]]+)\]", uri)
        hosts = (found[1] or found[2]).split(",") if found else []
    else:  # prterun-box-1234@1
        job, number = space, _number(space.rpartition("-")[2])
        hosts = [space.removeprefix("prterun-").rpartition("-")[0]] if space.startswith("prterun-") else []
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(size):
        hosts = ["127.0.0.1"]
    port = _FIRST_PORT + number % _PORTS
    addresses = (environ[ADDRESS],) if ADDRESS in environ else tuple(f"{_bracketed(host)}:{port}" for host in hosts)
    if not addresses:
        raise UserError(
            "this Open MPI does not say where process 0 is", where="environment",
            hint=f"mpirun -x {ADDRESS}=HOST:PORT ..., with the first host of the list and a free port",
        )  # fmt: skip
    return Place(index, size, addresses, f"mpi {job}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _number(text: str) -> int:
    """The whole number with which a text begins; 0 without one."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def _whole(environ, name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is not a whole number", where="environment") from None
