"""`Router.causal` against what happens to a token when later tokens of its sequence change, in evaluation."""

import pytest
import torch

import fastmoe
from fastmoe.routers import ROUTERS, option_names

ONE_EXPERT = {"switch", "base"}
NAMES = sorted(name for name, cls in ROUTERS.items() if cls.__module__.startswith("fastmoe."))
CASES = [
    *((name, {}) for name in NAMES),
    *(
        (name, {"eval_capacity_factor": 0.75})
        for name in NAMES
        if "eval_capacity_factor" in option_names(ROUTERS[name])
    ),
    ("switch", {"eval_capacity_factor": 0.5, "drop_by": "weight"}),
    ("gshard", {"eval_capacity_factor": 0.25}),
    ("swipe", {"eval_capacity_factor": float("inf")}),
]
BLIND = {"zero", "round_robin"}  # how many later tokens there are would matter, what they are does not
ROOMY = ("gshard", {})  # with room for twice the mean load it takes a worse load than this to show


# "random" draws anew in each pass
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "random"])
def test_causal_is_what_it_says(name, options):
    torch.manual_seed(0)
    given = dict(options) | ({"vocab_size": 11} if name == "hash" else {})
    layer = fastmoe.MoE(8, 4, 1 if name in ONE_EXPERT else 2, d_hidden=8, router=name, router_options=given).eval()
    changed = 0.0
    for _ in range(5):
        for parameter in layer.router.parameters():
            torch.nn.init.normal_(parameter)
        x, ids = torch.randn(1, 64, 8), torch.randint(11, (1, 64))
        later = x.clone()
        later[:, 32:] = torch.randn(1, 32, 8) + torch.randn(8)
        later_ids = torch.cat([ids[:, :32], torch.randint(11, (1, 32))], dim=1)
        with torch.no_grad():
            before = layer(x, token_ids=ids)[:, :32]
            after = layer(later, token_ids=later_ids)[:, :32]
        changed = max(changed, float((before - after).abs().max()))
    if layer.router.causal:
        assert changed < 1e-5
    elif (name, options) != ROOMY and name not in BLIND:
        assert changed > 1e-3
