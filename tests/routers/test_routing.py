"""`Routing`, the table of routers, and routers of one's own."""

import dataclasses

import pytest
import torch
from torch import nn

import fastmoe
from fastmoe import Routing
from fastmoe.routers import ROUTERS


class Mine(fastmoe.Router):
    def forward(self, x_TD):
        weights_TK, ids_TK = self.proj(x_TD).sigmoid().topk(self.top_k)
        return fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts)


class Bare(nn.Module):
    """No Router: every token to expert `t % E`, with weight 1."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_TD):
        ids_T1 = torch.arange(len(x_TD)).remainder(self.num_experts).unsqueeze(1)
        return Routing.from_topk(ids_T1, torch.ones_like(ids_T1, dtype=x_TD.dtype), self.num_experts)


class Answers(fastmoe.Router):
    """Gives whatever `answer(x_TD, ids_TK, weights_TK)` returns."""

    def __init__(self, d_model, num_experts, top_k, answer):
        super().__init__(d_model, num_experts, top_k)
        self.answer = answer

    def forward(self, x_TD):
        weights_TK, ids_TK = self.proj(x_TD).softmax(1).topk(self.top_k)
        return self.answer(x_TD, ids_TK, weights_TK)


def answering(answer, **options):
    return fastmoe.MoE(4, 3, 2, router=lambda d, e, k: Answers(d, e, k, answer), d_hidden=5, **options)


def test_from_topk():
    ids_TK, weights_TK = torch.tensor([[2, 0], [-1, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    routing = Routing.from_topk(ids_TK, weights_TK, 3)
    assert routing.token_ids_N.tolist() == [0, 0, 1, 1]
    assert routing.expert_ids_N.tolist() == [2, 0, -1, 1]
    assert torch.equal(routing.weights_N, weights_TK.flatten())
    assert (routing.num_tokens, routing.num_experts, routing.rows_per_token) == (2, 3, 2)
    assert int(routing.dropped) == 1
    assert routing.losses == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.num_tokens = 3


@pytest.mark.parametrize(("ids", "weights"), [((2, 2), (2, 3)), ((4,), (4,)), ((2, 2), (4,))])
def test_from_topk_refuses_other_shapes(ids, weights):
    with pytest.raises(ValueError, match=r"must both be \(T, K\); ids are .*, weights are"):
        Routing.from_topk(torch.zeros(ids, dtype=torch.int64), torch.zeros(weights), 3)


def test_a_router_of_ones_own():
    for layer in (
        fastmoe.MoE(4, 3, 2, router=Mine, d_hidden=5),
        fastmoe.MoE(4, 3, 2, router=Mine(4, 3, 2), d_hidden=5),
    ):
        layer = layer.double()
        x = torch.randn(6, 4, dtype=torch.float64)
        weights_TK, ids_TK = (x @ layer.router.proj.weight.T).sigmoid().topk(2)
        expected = torch.zeros_like(x)
        for t in range(6):
            for weight, e in zip(weights_TK[t], ids_TK[t], strict=True):
                w1, b1, w2, b2 = (getattr(layer.experts, name)[e] for name in ("w1", "b1", "w2", "b2"))
                expected[t] = expected[t] + weight * (w2 @ nn.functional.gelu(w1 @ x[t] + b1) + b2)
        got, by_hand = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (layer(x), expected))
        torch.testing.assert_close(layer(x), expected)
        for a, b in zip(got, by_hand, strict=True):
            torch.testing.assert_close(a, b)


def test_a_bare_module_as_router():
    layer = fastmoe.MoE(4, 3, 1, router=Bare(3), d_hidden=5)
    layer(torch.randn(7, 4))
    assert fastmoe.stats(layer)[""].counts.tolist() == [3, 2, 2]
    assert fastmoe.stats(layer)[""].entropy is None


def test_the_table(monkeypatch):
    monkeypatch.setattr("fastmoe.routers.base.ROUTERS", dict(ROUTERS))
    fastmoe.register_router("mine")(Mine)
    fastmoe.register_router("mine")(Mine)  # a module that is imported again
    assert isinstance(fastmoe.MoE(4, 3, router="mine").router, Mine)
    with pytest.raises(ValueError, match="'topk' is already registered, by TopKRouter"):
        fastmoe.register_router("topk")(Mine)
    with pytest.raises(ValueError, match=r"unknown router 'topkk'\. Did you mean 'topk'"):
        fastmoe.MoE(4, 3, router="topkk")


def test_a_router_without_forward():
    class Lazy(fastmoe.Router):
        pass

    with pytest.raises(TypeError, match=r"Lazy must define forward\(x_TD\) -> fastmoe.Routing"):
        fastmoe.MoE(4, 3, router=Lazy)(torch.randn(2, 4))


def flat(ids_TK, weights_TK, **changes):
    num_tokens, top_k = ids_TK.shape
    tokens_N = torch.arange(num_tokens).repeat_interleave(top_k)
    fields = {"token_ids_N": tokens_N, "expert_ids_N": ids_TK.flatten(), "weights_N": weights_TK.flatten()}
    return Routing(**(fields | {"num_tokens": num_tokens, "num_experts": 3} | changes))


WRONG = {
    "id too large": (lambda x, i, w: Routing.from_topk(i + 3, w, 3), r"expert.* ids must lie in .*got|gave"),
    "id is E": (lambda x, i, w: Routing.from_topk(torch.full_like(i, 3), w, 3), "ids must lie in"),
    "id below -1": (lambda x, i, w: Routing.from_topk(i - 4, w, 3), "ids must lie in"),
    "token too large": (
        lambda x, i, w: flat(i, w, token_ids_N=torch.full((10,), 5)),
        r"token ids must lie in 0..4, got 5..5",
    ),
    "token negative": (lambda x, i, w: flat(i, w, token_ids_N=torch.full((10,), -1)), "token ids must lie in 0..4"),
    "float ids": (lambda x, i, w: flat(i, w, expert_ids_N=i.flatten().float()), "expert_ids_N must be int64"),
    "int32 tokens": (
        lambda x, i, w: flat(i, w, token_ids_N=torch.zeros(10, dtype=torch.int32)),
        "token_ids_N must be int64",
    ),
    "fewer ids": (
        lambda x, i, w: flat(i, w, expert_ids_N=i.flatten()[:-1]),
        r"expert_ids_N must be int64 \(10,\).*\(9,\)",
    ),
    "other weights": (lambda x, i, w: flat(i, w, weights_N=w), r"weights must be floating \(10,\).*got .*\(5, 2\)"),
    "integer weights": (lambda x, i, w: flat(i, w, weights_N=i.flatten()), "weights must be floating"),
    "other tokens": (
        lambda x, i, w: Routing.from_topk(i[:3], w[:3], 3),
        "has 5 tokens and 3 experts, the router answered for 3 and 3",
    ),
    "other experts": (lambda x, i, w: Routing.from_topk(i, w, 4), "the router answered for 5 and 4"),
    "rows per token": (lambda x, i, w: flat(i, w, rows_per_token=3), "10 rows are not 3 for each of 5 tokens"),
    "a tuple": (lambda x, i, w: (i, w), "must return a fastmoe.Routing, got tuple"),
    "loss of a vector": (
        lambda x, i, w: Routing.from_topk(i, w, 3, {"mine": w.sum(1)}),
        r"no dimension, got \(5,\) for 'mine'",
    ),
    "loss of a number": (lambda x, i, w: Routing.from_topk(i, w, 3, {"mine": 0.5}), "no dimension, got 0.5 for 'mine'"),
    "scores": (lambda x, i, w: Routing.from_topk(i, w, 3, scores=w), r"scores must be \(5, 3\), got \(5, 2\)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("expert", [None, lambda: nn.Linear(4, 4)], ids=["stacked", "modules"])
def test_a_router_that_answers_wrongly(name, check, expert):
    answer, message = WRONG[name]
    options = {} if expert is None else {"expert": expert}
    layer = fastmoe.MoE(4, 3, 2, router=lambda d, e, k: Answers(d, e, k, answer), check=check, **options)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(5, 4))


FOUND_BY_CHECK = {
    "nan weights": (lambda x, i, w: Routing.from_topk(i, w * torch.nan, 3), "weights must be finite; 10 of 10"),
    "infinite loss": (lambda x, i, w: Routing.from_topk(i, w, 3, {"mine": w.sum() / 0}), "mine loss must be finite"),
    "nan scores": (
        lambda x, i, w: Routing.from_topk(i, w, 3, scores=torch.full((5, 3), torch.nan)),
        "scores must be finite",
    ),
    "not by token": (
        lambda x, i, w: flat(i, w, token_ids_N=torch.zeros(10, dtype=torch.int64), rows_per_token=2),
        "token by token",
    ),
}


@pytest.mark.parametrize("name", FOUND_BY_CHECK)
def test_debug_mode_looks_at_the_numbers(name):
    answer, message = FOUND_BY_CHECK[name]
    with pytest.raises(ValueError, match=message):
        answering(answer, check=True)(torch.randn(5, 4))


def test_dropped_rows():
    def drop_second_choices(x_TD, ids_TK, weights_TK):
        return Routing.from_topk(ids_TK.index_fill(1, torch.tensor([1]), -1), weights_TK, 3)

    layer = answering(drop_second_choices)
    layer(torch.randn(5, 4))
    assert fastmoe.stats(layer)[""].dropped == 5
    assert int(fastmoe.stats(layer)[""].counts.sum()) == 5
