"""A dense model of transformers becomes a Mixture of Experts: one line, then Trainer, save and load as ever.

pip install 'fastmoe[hf]'
python examples/huggingface_moefy.py
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import fastmoe
import fastmoe.integrations.huggingface  # a saved MoE model is known to the Auto classes from here on

LENGTH = 64


class Bytes(Dataset):
    """The bytes of a text, in pieces of `LENGTH`."""

    def __init__(self, text: bytes) -> None:
        self.ids = torch.tensor(list(text))

    def __len__(self) -> int:
        return len(self.ids) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.ids[index * LENGTH : (index + 1) * LENGTH]
        return {"input_ids": piece, "labels": piece}


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)
model = AutoModelForCausalLM.from_config(config)  # with a checkpoint: AutoModelForCausalLM.from_pretrained(name)
ids = torch.tensor([list(b"import torch")])
before = model(ids).logits

model = fastmoe.moefy(model, num_experts=8)  # every feed-forward block: 8 copies of itself and a router

print(fastmoe.summary(model))
print(f"outputs changed by at most {(model(ids).logits - before).abs().max():.1e}")

text = Path(torch.nn.__file__).with_name("functional.py").read_bytes()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=30,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=[],
    )
    Trainer(model=model, args=arguments, train_dataset=Bytes(text)).train()
    for name, stats in fastmoe.stats(model).items():
        print(name, stats)

    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
model.eval()
torch.testing.assert_close(loaded(ids).logits, model(ids.to(model.device)).logits.cpu())
print(type(loaded).__name__, "says", bytes(loaded.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()))

native = fastmoe.moefy(AutoModelForCausalLM.from_config(config), num_experts=8, to_native=True)
print("with to_native=True it is a", type(native).__name__, "which needs no fastmoe")
