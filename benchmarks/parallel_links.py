"""Worker of benchmarks/parallel.py: one MoE layer on two hosts, its dispatchers taking turns."""

import statistics
import time

import torch
import torch.distributed as dist
from parallel_launch import answer
from parallel_probe import gather, no_link, quartiles, traffic
from torch.distributed.device_mesh import init_device_mesh

import fastmoe
from fastmoe._processes import Processes
from fastmoe.dispatch import AllToAllDispatcher
from fastmoe.dispatch.exchange import Exchange

WAYS = {
    "plain": (1, False),
    "chunks=2": (2, False),
    "chunks=4": (4, False),
    "chunks=8": (8, False),
    "suppress": (1, True),
    "suppress, chunks=2": (2, True),
    "suppress, chunks=4": (4, True),
    "suppress, chunks=8": (8, True),
}
TOLERANCE = 1e-5  # float32, relative to a tensor's largest number


class Bench:
    """One layer, its input and its upstream gradient, on two processes that each hold half of the experts."""

    def __init__(self, job: dict, top_k: int, d_hidden: int) -> None:
        torch.manual_seed(0)
        self.layer = fastmoe.MoE(job["d_model"], job["experts"], top_k, d_hidden=d_hidden)
        fastmoe.parallelize(self.layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
        self.spread = self.layer.dispatcher.spread
        torch.manual_seed(1 + dist.get_rank())
        self.x, self.upstream = (torch.randn(job["tokens"], job["d_model"]) for _ in range(2))
        self.x.requires_grad_()

    def take(self, way: str) -> None:
        chunks, suppress = WAYS[way]
        self.layer.dispatcher = AllToAllDispatcher(self.spread, chunks=chunks, suppress_duplicates=suppress)

    def step(self) -> float:
        """Seconds of forward and backward."""
        self.layer.zero_grad()
        self.x.grad = None
        dist.barrier()
        start = time.perf_counter()
        self.y = self.layer(self.x)
        self.y.backward(self.upstream)
        return time.perf_counter() - start

    def compute(self) -> float:
        """Seconds of a step whose rows need not travel."""
        with no_link():
            return self.step()

    def results(self) -> list[torch.Tensor]:
        self.step()
        return [self.y.detach(), self.x.grad, *(p.grad.clone() for p in self.layer.parameters())]


def links(job: dict) -> dict:
    found: dict = {"link": probe()}
    d_hidden = calibrate(job)
    found |= {"d_hidden": d_hidden, "cases": []}
    for case in job["cases"]:
        bench = Bench(job, case["top_k"], d_hidden)
        found["cases"].append(case | {"ways": compare(bench, case["ways"], case["rounds"])})
    return found


def probe() -> dict[str, float]:
    """Round trip of one number, and the rate with 4 MiB going each way at once, as gloo has them.

    TCP takes some 20 MB to find the link's rate: only then is anything measured.
    """
    rank, number, trips = dist.get_rank(), torch.zeros(1), []
    for _ in range(50):
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                dist.send(number, 1 - rank)
            else:
                dist.recv(number, sender)
        trips.append(time.perf_counter() - start)
    seconds = statistics.median(slowest([replay([(4 << 20, 4 << 20)]) for _ in range(20)][-5:]))
    return {"round_trip_ms": statistics.median(trips) * 1e3, "megabits": (4 << 23) / seconds / 1e6}


def calibrate(job: dict) -> int:
    """The hidden width with which computing takes as long as exchanging."""
    d_hidden = 512
    for _ in range(3):
        bench = Bench(job, 2, d_hidden)
        bench.take("plain")
        sizes = exchanged(bench)
        compute = statistics.median(slowest([bench.compute() for _ in range(4)][1:]))
        exchange = statistics.median(slowest([replay(sizes) for _ in range(3)]))
        d_hidden = max(64, round(d_hidden * exchange / compute / 64) * 64)
    return d_hidden


def exchanged(bench: Bench) -> list[tuple[int, int]]:
    """What every exchange of a step takes away and brings, in bytes."""
    with traffic() as seen:
        bench.step()
    mine = torch.tensor(seen.sent)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    rank = dist.get_rank()
    return list(zip(both[rank].tolist(), both[1 - rank].tolist(), strict=True))


def replay(sizes: list[tuple[int, int]]) -> float:
    """Seconds of the same exchanges, one after another, with nothing between."""
    everyone = Processes.of()
    other = 1 - everyone.rank
    dist.barrier()
    start = time.perf_counter()
    for away, here in sizes:
        sent, received = [0, 0], [0, 0]
        sent[other], received[other] = away, here
        Exchange(everyone, sent, received, "replay").send(torch.empty(away, dtype=torch.uint8))
    return time.perf_counter() - start


def compare(bench: Bench, ways: list[str], rounds: int) -> dict[str, dict]:
    """Every way's times and bytes, if its numbers are those of the plain one."""
    found, sizes = {}, {}
    bench.take("plain")
    truth = bench.results()
    for way in ways:
        bench.take(way)
        sizes[way] = exchanged(bench)
        found[way] = {"error": checked(way, bench.results(), truth), "bytes_sent": sum(away for away, _ in sizes[way])}
    seconds: dict[str, dict[str, list[float]]] = {way: {"step": [], "compute": [], "exchange": []} for way in ways}
    for turn in range(rounds):
        for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
            bench.take(way)
            seconds[way]["step"].append(bench.step())
            if turn % 2 == 0:
                seconds[way]["compute"].append(bench.compute())
                seconds[way]["exchange"].append(replay(sizes[way]))
    plain = slowest(seconds["plain"]["step"])
    for way, kinds in seconds.items():
        found[way] |= {f"{kind}_ms": quartiles([s * 1e3 for s in slowest(times)]) for kind, times in kinds.items()}
        steps = slowest(kinds["step"])
        found[way]["of_plain"] = quartiles([step / base for step, base in zip(steps, plain, strict=True)])
    return found


def checked(way: str, results: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest difference in output and gradients, of both processes, relative to a tensor's largest number."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, truth, strict=True)]
    error = slowest([max(errors)])[0]
    if not error < TOLERANCE:
        raise ValueError(f"{way}: output or gradients differ from those of plain, by {error:.1e} of the largest number")
    return error


def slowest(seconds: list[float]) -> list[float]:
    """Of each round the time of the slower process."""
    return gather(seconds).amax(0).tolist()


if __name__ == "__main__":
    answer(links)
