"""`fastmoe.LoadMonitor` against loops over recorded routings."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmoe

E, D = 5, 6


class Recording(fastmoe.Router):
    """Top-2 that drops rows of low weight, and records what it answered."""

    def forward(self, x_TD):
        scores_TE = self.proj(x_TD).softmax(1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k)
        ids_TK = torch.where(weights_TK < 0.25, -1, ids_TK)
        loss = scores_TE.square().sum() / max(len(x_TD), 1)
        routing = fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts, {"mine": loss}, scores_TE)
        self.__dict__.setdefault("seen", []).append(routing)
        return routing


class Fixed(fastmoe.Router):
    """Sends every token to the experts in `ids`."""

    ids = (0, 1)

    def forward(self, x_TD):
        ids_TK = torch.tensor(self.ids).expand(len(x_TD), -1)
        return fastmoe.Routing.from_topk(ids_TK, torch.full(ids_TK.shape, 0.5), self.num_experts)


def build(router=Recording):
    return nn.Sequential(fastmoe.MoE(D, E, 2, d_hidden=4, router=router), nn.Linear(D, D))


def by_loops(routings):
    """Counts, dropped, tokens, unrouted tokens, mean weight, entropy and loss, one row at a time."""
    counts, dropped, tokens, unrouted, weights, entropies = [0] * E, 0, 0, 0, [], []
    for routing in routings:
        reached = set()
        rows = zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), routing.weights_N.tolist(), strict=True)
        for token, expert, weight in rows:
            if expert < 0:
                dropped += 1
                continue
            counts[expert] += 1
            weights.append(weight)
            reached.add(token)
        tokens += routing.num_tokens
        unrouted += routing.num_tokens - len(reached)
        entropies += [-sum(p * math.log(p) for p in scores) for scores in routing.scores_TE.tolist()]
    loss = sum(routing.losses["mine"].item() for routing in routings) / len(routings)
    return counts, dropped, tokens, unrouted, sum(weights) / len(weights), sum(entropies) / len(entropies), loss


def assert_as_loops(load, routings):
    counts, dropped, tokens, unrouted, weight, entropy, loss = by_loops(routings)
    assert list(load.counts) == counts
    assert (load.dropped, load.tokens, load.unrouted_tokens) == (dropped, tokens, unrouted)
    assert load.passes == len(routings)
    assert load.mean_weight == pytest.approx(weight, rel=1e-5)
    assert load.router_entropy == pytest.approx(entropy, rel=1e-5)
    assert load.losses == {"mine": pytest.approx(loss, rel=1e-5)}
    assert load.drop_rate == pytest.approx(dropped / (dropped + sum(counts)))
    mean = sum(counts) / E
    assert load.share == pytest.approx([count / sum(counts) for count in counts])
    assert load.max_over_mean == pytest.approx(max(counts) / mean)
    assert load.cv == pytest.approx(math.sqrt(sum((c - mean) ** 2 for c in counts) / E) / mean)
    assert load.entropy == pytest.approx(-sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c))


@pytest.mark.parametrize("masked", [False, True])
def test_figures_are_those_of_loops_over_uneven_passes(masked):
    model = build()
    with fastmoe.LoadMonitor(model) as monitor:
        for size in (7, 0, 12, 3):
            x = torch.randn(size, D)
            model[0](x, torch.rand(size) < 0.6 if masked else None)
        load = monitor.snapshot()["0"]
    assert load.dropped > 0
    assert_as_loops(load, model[0].router.seen)


def test_a_snapshot_starts_a_new_window():
    model = build()
    monitor = fastmoe.LoadMonitor(model)
    model(torch.randn(9, D))
    monitor.snapshot()
    model(torch.randn(4, D))
    assert_as_loops(monitor.snapshot()["0"], model[0].router.seen[1:])
    empty = monitor.snapshot()["0"]
    assert (empty.passes, empty.rows, empty.mean_weight, empty.cv, empty.drop_rate) == (0, 0, None, 0, 0)


def test_rows_in_any_order_and_demand_before_drops():
    class Choice(nn.Module):
        def forward(self, x_TD):
            tokens_N, experts_N = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, -1, -1])
            demand_E = torch.tensor([1, 0, 0, 2, 1])
            return fastmoe.Routing(
                tokens_N, experts_N, torch.full((4,), 0.5), len(x_TD), E, dropped=2, demand_E=demand_E
            )

    model = build(Choice())
    monitor = fastmoe.LoadMonitor(model)
    model(torch.randn(4, D))
    load = monitor.snapshot()["0"]
    assert (load.counts, load.demand) == ((0, 0, 0, 2, 0), (1, 0, 0, 2, 1))
    assert (load.dropped, load.unrouted_tokens, load.router_entropy) == (2, 2, None)


def test_an_expert_is_dead_after_so_many_passes_over_windows():
    model = build(Fixed)
    monitor = fastmoe.LoadMonitor(model, dead_after=3)
    model[0].router.ids = (2, 3)
    model(torch.randn(2, D))
    model[0].router.ids = (0, 1)
    for expected in ((), (4,), (2, 3, 4)):
        model(torch.randn(2, D))
        assert monitor.snapshot()["0"].dead == expected
    model[0].router.ids = (2, 3)
    model(torch.randn(2, D))
    assert monitor.snapshot()["0"].dead == (4,)


def test_change_since():
    model = build(Fixed)
    monitor = fastmoe.LoadMonitor(model)
    snapshots = [monitor.snapshot()]
    for ids in ((0, 1), (0, 2), (3, 4)):
        model[0].router.ids = ids
        model(torch.randn(2, D))
        snapshots.append(monitor.snapshot())
    empty, first, second, third = snapshots
    assert second.change_since(first) == {"0": pytest.approx(0.5)}
    assert third.change_since(first) == {"0": pytest.approx(1)}
    assert first.change_since(first) == {"0": 0}
    assert first.change_since(empty) == {}
    with pytest.raises(ValueError, match="different layers"):
        first.change_since(fastmoe.LoadSnapshot({}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pass_counts_once(reentrant):
    model = build()
    monitor = fastmoe.LoadMonitor(model)
    x = torch.randn(7, D, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert len(model[0].router.seen) == 2
    assert_as_loops(monitor.snapshot()["0"], model[0].router.seen[:1])


def test_evaluation_is_not_counted():
    model = build().eval()
    monitor = fastmoe.LoadMonitor(model)
    model(torch.randn(3, D))
    assert monitor.snapshot()["0"].passes == 0


def test_gradients_are_the_same_with_and_without():
    model, x = build(), torch.randn(5, D)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with fastmoe.LoadMonitor(model):
        model(x).sum().backward()
    for p, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, expected)


def test_closing_leaves_the_layers_as_before():
    model = build()
    with fastmoe.LoadMonitor(model) as monitor, fastmoe.LoadMonitor(model):
        assert len(model[0].observers) == 2
    monitor.close()
    assert model[0].observers == []


def test_a_monitored_model_is_copied_and_pickled_without_its_monitor():
    model = build()
    monitor = fastmoe.LoadMonitor(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.randn(3, D))
        assert twin[0].observers == []
    assert monitor.snapshot()["0"].passes == 0


def test_slots_of_a_soft_router():
    """Every expert computes 2 slots for each of 3 sequences; the entropy is of the experts' weights in a token."""
    model = nn.Sequential(fastmoe.MoE(D, E, 1, d_hidden=4, router="soft", router_options={"slots_per_expert": 2}))
    monitor = fastmoe.LoadMonitor(model)
    x, mask = torch.randn(3, 7, D), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    entropies = []
    for extra in ((), (mask,)):
        model[0](x, *extra)
        kept = mask.flatten() if extra else torch.ones(21, dtype=torch.bool)
        weights = model[0].router(x.flatten(0, 1), fastmoe.routers.RoutingContext(None, None, 3)).combine_BSL
        for of_token in weights.reshape(21, E, 2).sum(2)[kept].tolist():
            entropies.append(-sum(p * math.log(p) for p in of_token))
    load = monitor.snapshot()["0"]
    assert load.counts == load.demand == (12,) * E
    assert (load.passes, load.tokens, load.dropped, load.unrouted_tokens) == (2, 21 + 18, 0, 0)
    assert (load.mean_weight, load.cv, dict(load.losses)) == (None, 0.0, {})
    assert load.router_entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_a_compiled_model_is_monitored():
    model = nn.Sequential(fastmoe.MoE(D, E, 2, d_hidden=4))
    monitor = fastmoe.LoadMonitor(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, D)
    for _ in range(2):
        compiled(x).sum().backward()
    load = monitor.snapshot()["0"]
    assert (load.passes, load.rows, load.tokens) == (2, 28, 14)


def test_a_model_without_moe_is_an_error():
    with pytest.raises(ValueError, match=r"no fastmoe\.MoE layer"):
        fastmoe.LoadMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dead_after"):
        fastmoe.LoadMonitor(build(), dead_after=0)


BATCHES = [[7, 5], [4, None], [0, 3]]  # tokens of each process in each pass; None: that process does not run


# The experts of each process in each pass. Of 5, one alone has 1 and 4 each, 3 none, and 2 was used too long ago.
CHOSEN = [[(0, 1), (0, 1), (0, 1)], [(0, 2), (0, 4), (0, 4)]]


def snapshots():
    """Of both models, on one of the processes."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = build()
    monitor = fastmoe.LoadMonitor(model, dead_after=2)
    for step, sizes in enumerate(BATCHES):
        if sizes[rank] is not None:
            model(torch.randn(sizes[rank], D, generator=torch.Generator().manual_seed(10 * step + rank)))
    fixed = build(Fixed)
    watching = fastmoe.LoadMonitor(fixed, dead_after=2)
    for ids in CHOSEN[rank]:
        fixed[0].router.ids = ids
        fixed(torch.randn(3, D))
    return monitor.snapshot().to_plain(), watching.snapshot().to_plain()


@needs_gloo
def test_two_processes_equal_one():
    (together, fixed), other = run(2, snapshots)
    assert (together, fixed) == other
    assert fixed["0"]["dead"] == [2, 3]
    torch.manual_seed(0)
    model = build()
    for step, sizes in enumerate(BATCHES):
        for rank, size in enumerate(sizes):
            if size is not None:
                model(torch.randn(size, D, generator=torch.Generator().manual_seed(10 * step + rank)))
    assert_as_loops(fastmoe.LayerLoad.from_plain(together["0"]), model[0].router.seen)
