"""What a pass keeps for backward, and on a GPU its peaks: exact, in this process."""

import torch
from torch import Tensor

from fastmoe.bench.problem import Contender, Problem


def formula_bytes(p: Problem) -> int:
    """What must be kept: x, and the pre-activations of every row."""
    T, _, D, H, K = p.shape
    return p.x_TD.element_size() * (T * D + T * K * H * (1 + p.gated))


def memory_of(p: Problem, contender: Contender) -> dict[str, int]:
    """`kept_bytes`: storage that the graph holds, weights apart, x among it.

    On a GPU also `allocated_bytes`, what forward left behind beside its output, and each pass's peak above what was
    there before it, gradients apart.
    """
    found = {"formula_bytes": formula_bytes(p)}
    contender.clear()
    gpu = p.device != "cpu"
    before = _start() if gpu else 0
    y_TD, found["kept_bytes"] = run_and_count(p, contender)
    if gpu:
        found["allocated_bytes"] = torch.cuda.memory_allocated() - before - y_TD.nbytes
        found["forward_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        before = _start()
        y_TD.backward(contender.upstream)
        grads = sum(leaf.grad.nbytes for leaf in contender.leaves if leaf.grad is not None)
        found["backward_peak_bytes"] = torch.cuda.max_memory_allocated() - before - grads
    contender.clear()
    return found


def run_and_count(p: Problem, contender: Contender) -> tuple[Tensor, int]:
    """The output, and the bytes of all storage saved for backward that is no weight's."""
    weights = {leaf.untyped_storage().data_ptr() for leaf in contender.leaves if leaf is not p.x_TD}
    weights -= {p.weights_TK.untyped_storage().data_ptr()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # one that holds its own graph would be kept for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = contender.forward()
    return y_TD, sum(saved.values())


def _start() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
