"""Models of transformers on a GPU: its MoE models on our kernels, and dense ones that became MoE models."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastmoe  # noqa: E402
import fastmoe.integrations.huggingface  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or ROCm")]
DEVICE = "cuda"
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=8),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, head_dim=16),
}


def batch():
    ids = torch.randint(5, 97, (2, 16), device=DEVICE)
    return {"input_ids": ids, "labels": ids}


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_moe_models_compute_what_eager_does(name):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(MODELS[name](), experts_implementation="eager").to(DEVICE)
    ours = copy.deepcopy(theirs)
    ours.set_experts_implementation("fastmoe")
    given = batch()
    for model in (theirs, ours):
        model(**given).loss.backward()
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=1e-3, atol=1e-4)
    for key, grad in grads(theirs).items():
        assert (grads(ours)[key] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-6, key


def test_a_converted_model_trains_with_the_multiplier_of_its_loss():
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).to(DEVICE)
    given = batch()
    before = dense.eval()(**given).logits
    model = fastmoe.moefy(dense, 8)
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-3, atol=1e-4)
    reference = copy.deepcopy(model.train())
    with fastmoe.collect_aux_losses(reference) as losses:
        loss = reference(**given).loss
    ((loss + losses.total()) * 1024).backward()
    (model(**given).loss * 1024).backward()
    for key, grad in grads(reference).items():
        assert (grads(model)[key] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-6, key
