"""Worker processes of benchmarks/parallel.py: one thread each, started together; each answers with JSON."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        prefix: command that starts it there.
        environment: of gloo.
        address: of the first worker, as the others reach it.
    """

    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    address: str = "127.0.0.1"


def launch(script: str, job: dict, places: Sequence[Place]) -> list[dict]:
    """Run `script` in one process for each place; their answers by rank. If one fails, all are stopped.

    Raises:
        RuntimeError: with the end of what the worker that failed has printed.
    """
    port = str(_free_port())
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        try:
            for rank, place in enumerate(places):
                command = [*place.prefix, sys.executable, str(HERE / script), json.dumps(job), f"{folder}/{rank}.json"]
                variables = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(places)),
                    "MASTER_ADDR": place.address,
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                }
                with open(f"{folder}/{rank}.log", "w") as log:
                    environment = os.environ | variables | place.environment
                    workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            _wait(workers, Path(folder))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(len(places))]


def _wait(workers: list[subprocess.Popen], folder: Path) -> None:
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code:
                said = (folder / f"{rank}.log").read_text()[-3000:]
                raise RuntimeError(f"worker {rank} ended with {code}:\n{said}")
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def answer(work: Callable[[dict], dict]) -> None:
    """What a worker's script does: join the others, work, write the answer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = work(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    with suppress(RuntimeError):  # the others may be gone
        dist.destroy_process_group()
