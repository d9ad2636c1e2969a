"""`fmoe` on a GPU gives what it gives on a CPU."""

import plain_loops
import pytest
import torch

import fmoe
from fmoe import gates

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gate", [gates.NaiveGate, gates.NoisyGate, gates.GShardGate, gates.DCGate, gates.SwipeGate])
def test_a_layer(gate):
    layer = fmoe.FMoETransformerMLP(4, 64, 128, gate=gate).double().eval()
    x = torch.randn(33, 64, dtype=torch.float64)
    expected = plain_loops.outcome(layer, layer, x)
    layer.cuda()
    got = plain_loops.outcome(lambda x: layer(x.cuda()).cpu(), layer, x)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].cpu(), value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
