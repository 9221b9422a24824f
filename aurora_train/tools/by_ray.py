"""`aurora launch --ray`: a Ray cluster that is already running places the processes of a run.

Ray's JaxTrainer chooses the machines. On processors its workers would each train alone, without a warning, so each
worker starts the same command as any other launcher does, with an explicit address, and the processes refuse to train
unless jax sees all of them (`machine/processes.py`). A worker that Ray ends closes its agent, and the run saves.
"""

from __future__ import annotations

import os
import secrets
import sys

from aurora_train.errors import MissingExtra, UserError
from aurora_train.machine.line import EXIT_LOST
from aurora_train.machine.place import ADDRESS, COUNT, INDEX


def launch_by_ray(processes: int, arguments: list[str]) -> int:
    """Run `aurora ARGUMENTS` as so many processes on Ray's machines. Returns the exit status for all.

    UserError if Ray is not installed, or if no cluster is running or it has no room.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.jax import JaxTrainer
    except ImportError:
        raise MissingExtra("ray", "ray", "aurora launch --ray") from None
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True, logging_level="warning")
    except ConnectionError:
        raise UserError("no Ray cluster is running here", where="--ray",
                        hint="`ray start --head` on one machine, `ray start --address=HEAD:6379` on the others"
                        ) from None  # fmt: skip
    gpus = int(ray.cluster_resources().get("GPU", 0))
    each = {"CPU": 1} | ({"GPU": gpus // processes} if gpus >= processes else {})
    has = int(ray.cluster_resources().get("CPU", 0))
    if has < processes:
        raise UserError(f"the Ray cluster has {has} CPUs for {processes} processes", where="--processes",
                        hint="start Ray on more machines, or with `ray start --num-cpus`")  # fmt: skip
    settings = {"arguments": arguments, "folder": os.getcwd(), "job": secrets.token_hex(8)}
    trainer = JaxTrainer(
        _work, train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=processes, resources_per_worker=each, use_gpu="GPU" in each),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=0)),
    )  # fmt: skip
    try:
        trainer.fit()
    except Exception as error:  # a worker's own error, or that it is gone: Ray wraps both
        return _status_in(str(error))
    return 0


class _Failed(RuntimeError):
    """A process ended with a status other than 0."""


def _work(settings: dict) -> None:
    """One worker: agrees on an address with the others, and runs the command as a process of its own.

    Signals and the end of a process are the trainer's, and Ray runs this in a thread.
    """
    import json
    import subprocess

    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    from aurora_train.tools.agent import free_port

    rank, count = get_context().get_world_rank(), get_context().get_world_size()
    address = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{free_port()}" if rank == 0 else None)
    place = {ADDRESS: address, COUNT: str(count), INDEX: str(rank), "AURORA_JOB": settings["job"]}
    agent = subprocess.Popen(
        [sys.executable, "-P", "-m", "aurora_train.tools.agent"], cwd=settings["folder"], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    command = [sys.executable, "-P", "-m", "aurora_train", *settings["arguments"]]
    agent.stdin.write(json.dumps({"do": "run", "arguments": command, "variables": place}) + "\n")
    agent.stdin.flush()
    status = EXIT_LOST
    for line in agent.stdout:
        message = json.loads(line)
        if "status" in message:
            status = message["status"]
            break
        if rank == 0:
            print(message["line"], end="", flush=True)
    agent.stdin.close()
    if status:
        raise _Failed(f"process {rank} ended with status {status}")


def _status_in(said: str) -> int:
    """The exit status that a worker's error names; that of a lost process if it names none."""
    import re

    found = [int(number) for number in re.findall(r"ended with status (-?\d+)", said)]
    own = [status for status in found if status > 0 and status != EXIT_LOST]
    print(f"error: {said.splitlines()[0][:300]}" if not own else f"status {own[0]}", file=sys.stderr)
    return own[0] if own else EXIT_LOST
