"""A Mixture-of-Experts model of transformers on fastmoe's kernels: one argument, the same numbers.

pip install 'fastmoe[hf]'
python examples/huggingface_experts.py
"""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import fastmoe.integrations.huggingface  # noqa: F401  makes "fastmoe" an experts_implementation

config = MixtralConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
)
# With a checkpoint: AutoModelForCausalLM.from_pretrained(name, experts_implementation="fastmoe")
model = AutoModelForCausalLM.from_config(config, experts_implementation="fastmoe")
ids = torch.randint(0, config.vocab_size, (2, 32))


def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), model.model.layers[0].mlp.experts.gate_up_proj.grad.clone()


ours = loss_and_gradient()
model.set_experts_implementation("eager")
theirs = loss_and_gradient()
print(f"loss        fastmoe {ours[0]:.6f}   eager {theirs[0]:.6f}")
print(f"gradients   largest difference {(ours[1] - theirs[1]).abs().max():.1e} of {theirs[1].abs().max():.1e}")
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

model.set_experts_implementation("fastmoe")
text = model.eval().generate(ids[:, :4], max_new_tokens=8, do_sample=False)
print("generated  ", text[0].tolist())
