"""`FMoE` and `FMoETransformerMLP` on one process, against plain loops."""

import functools

import plain_loops
import pytest
import torch
from helpers import assert_same

import fmoe
from fmoe.gates import BaseGate, NaiveGate


def by_hand(layer, experts):
    def function(rows):
        flat = rows.reshape(-1, rows.shape[-1])
        logits = flat @ layer.gate.gate.weight.T + (0 if layer.gate.gate.bias is None else layer.gate.gate.bias)
        return plain_loops.mixture(flat, *plain_loops.softmax_topk(logits, layer.top_k), experts).view(rows.shape)

    return function


@pytest.mark.parametrize(("num_expert", "top_k"), [(5, 2), (4, 1), (3, 3), (16, 2)])
@pytest.mark.parametrize("gate_bias", [True, False])
def test_transformer_mlp(num_expert, top_k, gate_bias):
    layer = fmoe.FMoETransformerMLP(num_expert, 6, 9, top_k=top_k, gate_bias=gate_bias).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    assert_same(
        plain_loops.outcome(layer, layer, x), plain_loops.outcome(by_hand(layer, plain_loops.mlps(layer)), layer, x)
    )


def test_names_of_parameters_are_fastmoes():
    layer = fmoe.FMoETransformerMLP(2, 4, 8, torch.nn.ReLU())
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "experts.1" in name or "gate" in name} == {
        "experts.1.htoh4.weight": (1, 8, 4),
        "experts.1.htoh4.bias": (1, 8),
        "experts.1.h4toh.weight": (1, 4, 8),
        "experts.1.h4toh.bias": (1, 4),
        "gate.gate.weight": (2, 4),
        "gate.gate.bias": (2,),
    }


@pytest.mark.parametrize("listed", [False, True])
def test_experts_by_class(listed):
    expert = [plain_loops.RowExpert] * 3 if listed else plain_loops.RowExpert
    layer = fmoe.FMoE(7 if listed else 3, 5, expert=expert).double()
    assert layer.num_expert == len(layer.experts) == 3
    x = torch.randn(8, 5, dtype=torch.float64)
    got = plain_loops.outcome(layer, layer, x)
    assert sum(expert.counts[0][0] for expert in layer.experts) == 16
    experts = [lambda rows, e=e: e.linear(rows).tanh() for e in layer.experts]
    assert_same(got, plain_loops.outcome(by_hand(layer, experts), layer, x))


def test_experts_of_a_subclass():
    layer = plain_loops.Fused(3, 5, 7).double()
    x = torch.randn(8, 5, dtype=torch.float64)

    def one(e):
        up, down = layer.experts.htoh4, layer.experts.h4toh
        return lambda rows: (
            torch.nn.functional.silu(rows @ up.weight[e].T + up.bias[e]) @ down.weight[e].T + down.bias[e]
        )

    expected = plain_loops.outcome(by_hand(layer, [one(e) for e in range(3)]), layer, x)
    assert_same(plain_loops.outcome(layer, layer, x), expected)


def test_marks():
    layer = plain_loops.Fused(3, 5, 7)
    assert {p.dp_comm for p in layer.experts.parameters()} == {"dp"}
    assert {p.dp_comm for p in layer.gate.parameters()} == {"gate"}
    assert {p.dp_comm for p in fmoe.FMoETransformerMLP(2, 4, 8).experts.parameters()} == {"none"}
    assert {p.dp_comm for p in fmoe.FMoE(2, 4, 2, expert=plain_loops.RowExpert).experts.parameters()} == {"none"}
    assert not hasattr(fmoe.FMoE(2, 4, expert=plain_loops.RowExpert).experts[0].linear.weight, "dp_comm")
    with pytest.raises(ValueError, match=r"set self\.experts before"):
        fmoe.FMoE(2, 4).mark_parallel_comm()


class PairGate(NaiveGate):
    """Looks at one part of a structure only."""

    def forward(self, inp):
        return super().forward(inp["rows"] if isinstance(inp, dict) else inp[0])


class PairExpert(plain_loops.RowExpert):
    """`(rows, numbers)` in, their product and the rows out."""

    def forward(self, inp, fwd_expert_count):
        rows, numbers = inp.values() if isinstance(inp, dict) else inp
        return {"product": self.linear(rows) * numbers, "rows": [rows[:, :2]]}


@pytest.mark.parametrize("kind", [dict, list])
def test_structures_in_and_out(kind):
    layer = fmoe.FMoE(3, 4, gate=PairGate, expert=PairExpert).double()
    rows, numbers = torch.randn(6, 4, dtype=torch.float64), torch.arange(6).view(6, 1)

    def layer_of(rows):
        out = layer({"rows": rows, "numbers": numbers} if kind is dict else [rows, numbers])
        return torch.cat([out["product"], out["rows"][0]], dim=1)

    def loop(rows):
        experts = [
            lambda row, e=e: torch.cat([e.linear(row[:, :4]) * row[:, 4:], row[:, :2]], 1) for e in layer.experts
        ]
        choices = plain_loops.softmax_topk(layer.gate.gate(rows), 2)
        return plain_loops.mixture(torch.cat([rows, numbers], 1), *choices, experts)

    assert_same(plain_loops.outcome(layer_of, layer, rows), plain_loops.outcome(loop, layer, rows))


def test_different_batch_sizes():
    with pytest.raises(ValueError, match=r"same batch size, got \[2, 3\]"):
        fmoe.FMoE(3, 4, gate=PairGate, expert=PairExpert)([torch.randn(2, 4), torch.randn(3, 1)])


class Dropping(BaseGate):
    """A gate of one's own, with the shapes of FastMoE's older gates; the first token goes nowhere."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, x):
        ids = torch.arange(len(x) * self.top_k) % self.tot_expert
        ids[: self.top_k] = -1
        return ids, torch.full((len(x), 1, self.top_k), 0.5)


def test_a_gate_of_ones_own_drops_choices():
    layer = fmoe.FMoETransformerMLP(3, 4, 8, gate=Dropping).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    ids = torch.arange(10).view(5, 2) % 3
    ids[0] = -1
    half = torch.full((5, 2), 0.5, dtype=torch.float64)
    expected = plain_loops.outcome(lambda x: plain_loops.mixture(x, ids, half, plain_loops.mlps(layer)), layer, x)
    assert_same(plain_loops.outcome(layer, layer, x), expected)
    assert not layer(x)[0].any()


def test_gate_hook_sees_every_choice():
    seen = []
    layer = fmoe.FMoETransformerMLP(3, 4, 8, gate_hook=lambda *given: seen.append(given))
    layer(torch.randn(5, 4))
    (ids, weights, nothing), *_ = seen
    assert ids.shape == weights.shape == (5, 2)
    assert nothing is None


def test_masked_rows_get_what_the_dictionary_says():
    layer = fmoe.FMoETransformerMLP(3, 4, 8).double()
    x, fill = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    whole = plain_loops.outcome(layer, layer, x)["out"]
    layer.mask, layer.mask_dict = torch.tensor([[0, 1, 0], [2, 0, 3]]), {1: fill, 2: 5.0}
    got = plain_loops.outcome(layer, layer, x)
    kept = layer.mask == 0
    torch.testing.assert_close(got["out"][kept], whole[kept])
    torch.testing.assert_close(got["out"][0, 1], fill)
    torch.testing.assert_close(got["out"][1, 0], torch.full((4,), 5.0, dtype=torch.float64))
    assert not got["out"][1, 2].any()
    layer.mask_dict = None
    with pytest.raises(ValueError, match="belong together"):
        layer(x)


class OlderGate(NaiveGate):
    """Written before there was a `gate_bias`."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__(d_model, num_expert, world_size, top_k)


def test_a_gate_without_gate_bias():
    assert fmoe.FMoETransformerMLP(3, 4, 8, gate=OlderGate).gate.gate.bias is not None
    with pytest.raises(ValueError, match="OlderGate takes no gate_bias"):
        fmoe.FMoETransformerMLP(3, 4, 8, gate=OlderGate, gate_bias=False)


class Doubling(fmoe.FMoETransformerMLP):
    """An `expert_fn` of one's own, around that of the layer."""

    def expert_fn(self, inp, fwd_expert_count):
        assert len(inp) == int(fwd_expert_count.sum())
        return 2 * super().expert_fn(inp, fwd_expert_count)


def test_expert_fn_of_ones_own():
    layer, doubling = fmoe.FMoETransformerMLP(3, 4, 8), Doubling(3, 4, 8)
    doubling.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(doubling(x), 2 * layer(x))


def test_answers_that_do_not_fit():
    layer = fmoe.FMoE(3, 4, expert=lambda _: Halving())
    with pytest.raises(ValueError, match="given 10 rows and must answer as many"):
        layer(torch.randn(5, 4))


class Halving(torch.nn.Module):
    def forward(self, inp, fwd_expert_count):
        return inp[: len(inp) // 2]


def test_autocast():
    layer, x = fmoe.FMoETransformerMLP(3, 8, 16), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    out.sum().backward()


def test_mask_of_another_length():
    layer = fmoe.FMoETransformerMLP(3, 4, 8, mask=torch.zeros(4), mask_dict={})
    with pytest.raises(ValueError, match="a number for each of 5 rows, got 4"):
        layer(torch.randn(5, 4))


def test_no_token():
    layer = fmoe.FMoETransformerMLP(3, 4, 8)
    layer(torch.randn(0, 4)).sum().backward()
    assert not layer.experts[2].htoh4.weight.grad.any()


def test_top1_learns_unless_the_old_weight_is_asked_for():
    x = torch.randn(6, 4)
    for gate, learns in ((NaiveGate, True), (functools.partial(NaiveGate, top1_weight_one=True), False)):
        layer = fmoe.FMoETransformerMLP(3, 4, 8, top_k=1, gate=gate)
        layer(x).square().sum().backward()
        assert bool(layer.gate.gate.weight.grad.any()) is learns


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 4}, "number of experts, 3, got 4"),
        ({"num_expert": 0}, "num_expert must be a whole number >= 1"),
        ({"expert": []}, "number of experts in the list"),
        (
            {"gate": lambda *_: lambda x: (torch.zeros(5, 3, dtype=torch.int64), torch.ones(5, 3))},
            r"top_k_idx of \(5, 2\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        fmoe.FMoE(**{"num_expert": 3, "d_model": 4, "expert": plain_loops.RowExpert, **options})(torch.randn(5, 4))


def test_wrong_width():
    with pytest.raises(ValueError, match=r"inp must be \(\.\.\., 4\), got \(2, 5\)"):
        fmoe.FMoETransformerMLP(3, 4, 8)(torch.randn(2, 5))
