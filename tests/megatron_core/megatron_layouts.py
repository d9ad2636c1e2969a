"""The layouts of processes, and the ways to save memory, that must not change what a model computes."""

import torch

SPLIT = {"sequence_parallel": True}  # which Megatron's MoE asks for with tensor parallelism

# name: (world, the sizes that `run` takes, overrides of the configuration)
LAYOUTS = {
    "dp2": (2, {}, {}),
    "ep2": (2, {"ep": 2}, {}),
    "ep2, allgather": (2, {"ep": 2}, {"moe_token_dispatcher_type": "allgather"}),
    "tp2": (2, {"tp": 2}, SPLIT),
    "tp2 ep2 etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, SPLIT),
    # gloo has no all-gather of uneven parts, which the all-to-all dispatcher needs here
    "tp2 ep2 etp2": (4, {"tp": 2, "ep": 2}, SPLIT | {"moe_token_dispatcher_type": "allgather"}),
    "pp2": (2, {"pp": 2}, {}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}, {}),
}
RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def assert_same(found, expected):
    """Of what `trained` returns: losses, norms of gradients, each gradient and each value at the end."""
    for name in ("losses", "norms"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **TOLERANCE)
    assert found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        if found.gradients:
            torch.testing.assert_close(found.gradients[name], expected.gradients[name], **TOLERANCE, msg=_named(name))
        # Adam makes steps of equal size of gradients near zero, too
        torch.testing.assert_close(found.values[name], value, rtol=1e-3, atol=1e-4, msg=_named(name))


def _named(name):
    return lambda text: f"{name}: {text}"
