"""What Megatron-Core does around a model: precision, padding, multi-token prediction, overlapped reductions."""

import feature_cases
import pytest
import torch
from megatron_processes import run
from model_cases import layer_spec


def test_a_layer_of_multi_token_prediction_has_metrics_of_its_own(version):
    ((found, learn),) = run(version, 1, feature_cases.multi_token_prediction)
    assert learn == [True] * 3
    assert all(len(values) == 3 and values.all() for values in found.values())


def test_loss_scale_of_float16(version):
    (ours,), (theirs,) = (run(version, 1, feature_cases.half_precision, spec) for spec in (layer_spec, None))
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)


def test_padding(version):
    (theirs,), (ours,) = (run(version, 1, feature_cases.padded, spec) for spec in (None, layer_spec))
    torch.testing.assert_close(ours, theirs)
    for split, *_ in run(version, 2, feature_cases.padded, layer_spec, tp=2, etp=2):
        torch.testing.assert_close(split, ours[0])


@pytest.mark.parametrize("ep", [1, 2])
def test_overlapped_reductions(version, ep):
    together, after = (run(version, 2, feature_cases.overlapped, overlap, ep=ep) for overlap in (True, False))
    torch.testing.assert_close(together, after)


def test_tied_embeddings(version):
    ours, theirs = run(version, 1, feature_cases.tied)[0]
    torch.testing.assert_close(ours, theirs)


def test_layers_share_no_module(version):
    assert run(version, 1, feature_cases.one_router_for_all) == [(2, True)]


@pytest.mark.parametrize("further", [{}, {"add_bias_linear": True}, {"moe_shared_expert_intermediate_size": 20}])
def test_keys_one_by_one_are_megatrons(version, further):
    theirs, ours = run(version, 1, feature_cases.keys_one_by_one, further)[0]
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key].reshape(value.shape), value), key


def test_a_repeated_layer_of_multi_token_prediction(version):
    if version == "installed":
        pytest.skip("Megatron-Core 0.16 has none")
    theirs, ours = run(version, 1, feature_cases.repeated_multi_token_prediction)[0]
    torch.testing.assert_close(ours, theirs)


def test_multi_token_prediction_of_a_converted_model(version):
    (found,) = run(version, 1, feature_cases.converted_with_multi_token_prediction)
    assert all(len(values) == 3 and values.all() for values in found.values())


def test_balance_losses_can_be_scaled(version):
    (once,), (twice,) = (run(version, 1, feature_cases.scaled_losses, scale) for scale in (1.0, 2.0))
    assert all(grad.any() for grad in once)
    torch.testing.assert_close(twice, [2 * grad for grad in once])
