"""Inputs for the kernels, and the comparisons. No fixture lives here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoe import kernels

GRADS = ("x", "weights", "w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Case:
    """T, E, D, H, K, and how rows are routed (see `route`)."""

    T: int
    E: int
    D: int
    H: int
    K: int
    routed: str = "random"


CASES = {
    "odd": Case(13, 5, 7, 9, 2),
    "empty_experts": Case(3, 16, 6, 5, 2),
    "one_expert_gets_all": Case(9, 4, 5, 6, 2, "one"),
    "one_token": Case(1, 4, 3, 5, 2),
    "no_token": Case(0, 4, 3, 5, 2),
    "k_is_e": Case(6, 3, 5, 7, 3),
    "single_expert": Case(5, 1, 3, 4, 1),
    "dropped": Case(11, 4, 5, 3, 3, "dropped"),
    "all_dropped": Case(4, 3, 5, 3, 2, "all_dropped"),
    "duplicates": Case(10, 4, 6, 3, 3, "duplicates"),
    "width_one": Case(50, 3, 1, 1, 2),
    "expert_choice": Case(8, 3, 5, 7, 2, "expert_choice"),
}


def route(case: Case) -> tuple[Tensor, Tensor, int]:
    """`token_ids_N`, `expert_ids_N`, `rows_per_token`."""
    T, E, K = case.T, case.E, case.K
    if case.routed == "expert_choice":  # any number of rows for a token, in any order, some dropped
        return torch.randint(T, (3 * T,)), torch.randint(-1, E, (3 * T,)), 0
    ids_TK = torch.rand(T, E).argsort(1)[:, :K]
    if case.routed == "one":
        ids_TK = torch.full((T, K), 1)
    elif case.routed == "dropped":
        ids_TK = torch.where(torch.rand(T, K) < 0.4, -1, ids_TK)
    elif case.routed == "all_dropped":
        ids_TK = torch.full((T, K), -1)
    elif case.routed == "duplicates":
        ids_TK = torch.randint(E, (T, K)) % 2
    return torch.arange(T).repeat_interleave(K), ids_TK.reshape(-1), K


def mlp_tensors(case: Case, num_rows: int, activation: str, bias: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The differentiable arguments of `kernels.expert_mlp`, by name; routing weights are float32 at least."""
    E, D, H = case.E, case.D, case.H
    width = H * (1 + kernels.get_activation(activation).gated)
    shapes = {
        "x": (case.T, D),
        "weights": (num_rows,),
        "w1": (E, width, D),
        "b1": (E, width),
        "w2": (E, D, H),
        "b2": (E, D),
    }
    made: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, dtype=torch.float64) / (shape[-1] ** 0.5 if name in ("w1", "w2") else 1)
        made[name] = values.to(kernels.accumulation_dtype(dtype) if name == "weights" else dtype)
    return made if bias else made | {"b1": None, "b2": None}


def routed_mlp(backend: str, case: Case, token_ids_N: Tensor, expert_ids_N: Tensor, activation: str, per_token: int):
    """`kernels.expert_mlp` as a function of its differentiable arguments."""

    def function(x, weights, w1, b1, w2, b2):
        plan = kernels.plan(expert_ids_N, case.E, backend=backend)
        return kernels.expert_mlp(
            x, token_ids_N, weights, plan, w1, b1, w2, b2,
            activation=activation, rows_per_token=per_token, backend=backend,
        )  # fmt: skip

    return function


def cast(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def run_with_grads(function, tensors: dict[str, Tensor | None], upstream: Tensor) -> dict[str, Tensor]:
    """`function(**tensors)` and the gradient of every tensor, by name; the output is `out`."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves)
    out.backward(upstream.to(out.dtype))
    result = {"out": out.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            assert leaf.grad is not None, f"no gradient for {name}"
            result[name] = leaf.grad
    return result


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to float64 rounding, in shape and dtype, for every name; NaN never passes."""
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_measured(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """`got` is at most twice as far from the float64 result as plain PyTorch in the same dtype, plus two roundings."""
    assert got.keys() == plain.keys() == exact.keys()
    eps = torch.finfo(got["out"].dtype).eps
    for name, truth in exact.items():
        assert (got[name].shape, got[name].dtype) == (plain[name].shape, plain[name].dtype), name
        if not truth.numel():
            continue
        floor = 2 * eps * float(truth.abs().max())
        error, allowed = (float((t.double() - truth).abs().max()) for t in (got[name], plain[name]))
        assert error <= 2 * allowed + floor, (
            f"{name}: error {error:.3g}, plain PyTorch {allowed:.3g}, floor {floor:.3g}"
        )


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; a missing one is an error."""
    grads = {}
    for name, param in module.named_parameters():
        assert param.grad is not None, f"no gradient for {name}"
        grads[name] = param.grad.clone()
    return grads
