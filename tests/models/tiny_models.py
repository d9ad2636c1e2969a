"""The language models, small, with weights large enough for everything to matter."""

import torch

from fastmoe.models import GPT, GPTConfig, LSTMConfig, LSTMLanguageModel, TransformerXL, TransformerXLConfig

V = 50
CUTOFFS = {"cutoffs": (10, 30), "div_value": 2.0}


def gpt(**options):
    return GPT(GPTConfig(**{"vocab_size": V, "block_size": 16, "n_layer": 2, "n_head": 2, "d_model": 8} | options))


def xl(**options):
    sizes = {"vocab_size": V, "n_layer": 2, "n_head": 2, "d_model": 8, "d_hidden": 16, "memory_length": 6}
    return TransformerXL(TransformerXLConfig(**sizes | options))


def lstm(**options):
    return LSTMLanguageModel(LSTMConfig(**{"vocab_size": V, "d_model": 8, "d_hidden": 16} | options))


MAKERS = {
    "gpt": gpt,
    "xl": xl,
    "xl_adaptive": lambda **options: xl(**CUTOFFS | options),
    "lstm": lstm,
    "lstm_adaptive": lambda **options: lstm(**CUTOFFS | options),
}


def large(model, std=0.5):
    """The model in float64, in evaluation mode, all its parameters drawn from N(0, std)."""
    for parameter in model.double().eval().parameters():
        parameter.data.normal_(std=std)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
