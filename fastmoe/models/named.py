"""The named configurations: one table, a row each.

Of the models that stand in papers the sizes are the published ones; "tiny" ones are for minutes on a CPU. A name with
`-moe` has the dense one's active FLOPs, the router's aside: top 2 of experts half as wide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastmoe._device import on_device
from fastmoe._errors import unknown_name
from fastmoe.models.gpt import GPT, GPTConfig
from fastmoe.models.lstm import LSTMConfig, LSTMLanguageModel
from fastmoe.models.transformer_xl import TransformerXL, TransformerXLConfig

Config = GPTConfig | LSTMConfig | TransformerXLConfig
LanguageModel = GPT | LSTMLanguageModel | TransformerXL
CLASSES: dict[type[Config], Callable[[Any], LanguageModel]] = {
    GPTConfig: GPT,
    LSTMConfig: LSTMLanguageModel,
    TransformerXLConfig: TransformerXL,
}

TXL_BASE = TransformerXLConfig(dropout=0.1)  # Dai et al. 2019, the 41M model of section 4.1
TXL_TINY = TransformerXLConfig(n_layer=2, n_head=4, d_model=64, d_hidden=256, memory_length=64, pre_norm=True)
GPT_SMALL = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768, bias=True)  # GPT-2 small
GPT_TINY = GPTConfig(block_size=64, n_layer=2, n_head=4, d_model=64, positions="rotary")
LSTM_BASE = LSTMConfig(dropout=0.1)
LSTM_TINY = LSTMConfig(d_model=64, d_hidden=256)

# Fedus et al. 2021 (2101.03961), table 9: 15 layers, d_model 2080, d_ff 6144, 32 heads of 64, 2048 experts in each
# layer; as a T5 it has 15 layers in the encoder and 15 in the decoder, 32128 tokens. Here they are one decoder of 30,
# which lacks the attention from one to the other, 0.26 of 1571 billion.
SWITCH_C = GPTConfig(
    vocab_size=32128, block_size=512, n_layer=30, n_head=32, d_head=64, d_model=2080, d_hidden=6144, norm="rms",
    num_experts=2048, top_k=1, router="switch",
)  # fmt: skip
# Lepikhin et al. 2020 (2006.16668), table 1, MoE(2048E, 36L): 36 layers of encoder and decoder together, 2048 experts
# in every other one; appendix A.2: d_model 1024, d_ff 8192, 16 heads of 128, 64000 tokens on the source's side. Here
# one decoder of 36, which lacks 0.15 of 619 billion in the same way.
GSHARD_600B = GPTConfig(
    vocab_size=64000, block_size=1024, n_layer=36, n_head=16, d_head=128, d_model=1024, d_hidden=8192,
    num_experts=2048, top_k=2, expert_hidden=8192, moe_every=2, router="gshard",
)  # fmt: skip

LARGEST = 100 * 10**9
"""Parameters of what `build` makes on a device: 400 GB in float32."""


def with_experts(config: Config, num_experts: int) -> Config:
    """A config's MoE twin: `num_experts` experts, top 2, each half as wide."""
    return dataclasses.replace(config, num_experts=num_experts, top_k=2)


NAMED: dict[str, Config] = {
    "txl-enwik8-base": TXL_BASE,
    "txl-enwik8-base-moe64": with_experts(TXL_BASE, 64),
    "txl-tiny": TXL_TINY,
    "txl-tiny-moe": with_experts(TXL_TINY, 16),
    "gpt-small": GPT_SMALL,
    "gpt-small-moe96": with_experts(GPT_SMALL, 96),
    "gpt-tiny": GPT_TINY,
    "gpt-tiny-moe": with_experts(GPT_TINY, 16),
    "lstm-dense": LSTM_BASE,
    "lstm-moe512": with_experts(LSTM_BASE, 512),
    "lstm-tiny": LSTM_TINY,
    "lstm-tiny-moe": with_experts(LSTM_TINY, 16),
    "switch-c": SWITCH_C,
    "gshard-600b": GSHARD_600B,
}


def named_config(name: str, **changes: Any) -> Config:
    """The configuration of that name, with some of its fields changed: `num_experts=0` makes it dense.

    Raises:
        ValueError: no such name, or no such field.
    """
    if name not in NAMED:
        raise unknown_name("model", name, NAMED)
    config = NAMED[name]
    known = [field.name for field in dataclasses.fields(config)]
    for field in changes:
        if field not in known:
            raise unknown_name(f"field of {type(config).__name__}", field, known)
    return dataclasses.replace(config, **changes)


def build(name: str, device: torch.device | str | None = None, **changes: Any) -> LanguageModel:
    """A model by its name, with fresh weights.

    ```
    model = fastmoe.models.build("gpt-small-moe96", device="meta")
    print(fastmoe.summary(model))
    ```

    Args:
        name: a row of `fastmoe.models.NAMED`.
        device: where the weights are; on "meta" there are none, and any size can be counted.
        changes: fields of the configuration, as in `named_config`.

    Raises:
        ValueError: no such name or field; more than `LARGEST` parameters, on another device than "meta".
    """
    config = named_config(name, **changes)
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type != "meta" and (size := count_parameters(config)) > LARGEST:
        raise ValueError(
            f"{name!r} with {size:,} parameters is there for its count, expected at most {LARGEST:,} on a device: "
            f"build it with device='meta', got {device!r}"
        )
    with on_device(device):
        return CLASSES[type(config)](config)


def count_parameters(config: Config) -> int:
    with on_device("meta"):
        return sum(parameter.numel() for parameter in CLASSES[type(config)](config).parameters())
