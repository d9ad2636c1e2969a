"""Worker of benchmarks/parallel.py: weak scaling. Groups of more and more processes take turns."""

import time

import torch
import torch.distributed as dist
from parallel_launch import answer
from parallel_probe import gather, quartiles, traffic
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastmoe

WARM_UP = 2


class Trainee:
    """A model with a fixed number of experts on each of the first `size` processes; its step."""

    def __init__(self, job: dict, size: int, together: bool) -> None:
        D, E = job["d_model"], job["experts"] * (size if together else 1)
        torch.manual_seed(0)
        self.moe = fastmoe.MoE(D, E, job["top_k"], d_hidden=job["d_hidden"])
        self.model = nn.Sequential(nn.Linear(D, D), self.moe, nn.Linear(D, D))
        mesh = _first(size) if together else _alone()
        if dist.get_rank() < size:
            fastmoe.parallelize(self.model, mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        torch.manual_seed(1 + dist.get_rank())
        self.x = torch.randn(job["tokens"], D)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()


def _first(size: int) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(size), mesh_dim_names=("ep",))


def _alone() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("each", "ep"))["ep"]


def scaling(job: dict) -> dict:
    """For each number of processes: step time and exchange share of one model, and of separate ones side by side."""
    cases = {(size, together): Trainee(job, size, together) for size in job["sizes"] for together in (True, False)}
    seconds: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    shares: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(WARM_UP + job["rounds"]):
        for case, trainee in cases.items():
            took, share = timed(trainee) if dist.get_rank() < case[0] else (0.0, 0.0)
            seconds[case].append(took)
            shares[case].append(share)
            dist.barrier()
    sizes = {str(size): summary(size, seconds, shares) for size in job["sizes"]}
    for size in job["sizes"]:
        sizes[str(size)]["busiest"] = busiest(cases[size, True], size)
    return {"sizes": sizes}


def timed(trainee: Trainee) -> tuple[float, float]:
    with traffic() as seen:
        start = time.perf_counter()
        trainee.step()
        took = time.perf_counter() - start
    return took, seen.seconds / took


def busiest(trainee: Trainee, size: int) -> float:
    """Rows that the process with the most of them computes, in the last step, over their mean."""
    stats = trainee.moe.last_stats
    rows_E = gather([0.0] * trainee.moe.num_experts if stats is None else stats.counts.tolist()).sum(0)
    rows_P = rows_E.view(size, -1).sum(1)
    return float(rows_P.max() / rows_P.mean())


def summary(size: int, seconds: dict, shares: dict) -> dict:
    """Of each round: the slowest process's time, and the mean share of the exchange."""

    def slowest(case: tuple[int, bool]) -> list[float]:
        return gather(seconds[case])[:, WARM_UP:].amax(0).tolist()

    together, apart, first = slowest((size, True)), slowest((size, False)), slowest((1, True))
    share = gather(shares[size, True])[:size, WARM_UP:].mean(0).tolist()
    return {
        "step_ms": quartiles([second * 1e3 for second in together]),
        "apart_ms": quartiles([second * 1e3 for second in apart]),
        "exchange_share": quartiles(share),
        "efficiency": quartiles([one / all_ for one, all_ in zip(first, together, strict=True)]),
        "of_apart": quartiles([alone / all_ for alone, all_ in zip(apart, together, strict=True)]),
    }


if __name__ == "__main__":
    answer(scaling)
