"""A contender in a CUDA graph: captured once, then replayed, as servers decode."""

from collections.abc import Callable

import torch

from fastmoe.bench.problem import Contender, Problem, RefusedError

_WARM_UP = 3


def in_graph_name(name: str) -> str:
    return f"{name} in a CUDA graph"


def in_graph(build: Callable[[Problem], Contender]) -> Callable[[Problem], Contender]:
    """The same contender, forward alone, replayed from a graph."""

    def built(p: Problem) -> Contender:
        if p.device == "cpu":
            raise RefusedError("a CUDA graph needs a GPU")
        if p.backward:
            raise RefusedError("in a graph forward alone is timed")
        contender = build(p)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture does not put it back
            _warm_up(contender)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y_TD = contender.forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return y_TD

        return Contender(replay, contender.leaves, contender.upstream, contender.grads, replayed=True)

    return built


def _warm_up(contender: Contender) -> None:
    """Compile, and find out who waits for the device: a capture that breaks off leaves PyTorch in disorder."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contender.forward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(_WARM_UP):
                contender.forward()
        except RuntimeError as error:
            raise RefusedError(f"it waits for the device: {str(error).splitlines()[0]}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
