"""Configurations that would make a wrong network, or none, are refused in their own words."""

import pytest

from fastmoe.models import GPTConfig, LSTMConfig, TransformerXLConfig

ALL = (GPTConfig, LSTMConfig, TransformerXLConfig)


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("vocab_size", -1, 1),
        ("d_model", 0, 1),
        ("d_hidden", 0, 1),
        ("num_experts", -1, 0),
        ("num_experts", 1.5, 0),
        ("top_k", 0, 1),
        ("moe_every", 0, 1),
        ("moe_every", -2, 1),
        ("expert_hidden", 0, 1),
    ],
)
def test_sizes_of_all_models(config, field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be a whole number >= {least}, got {value}"):
        config(**{field: value})


@pytest.mark.parametrize(
    ("config", "field", "value", "least"),
    [
        (GPTConfig, "block_size", 0, 1),
        (GPTConfig, "n_layer", 0, 1),
        (GPTConfig, "n_head", 0, 1),
        (GPTConfig, "n_kv_head", 0, 1),
        (GPTConfig, "d_head", 0, 1),
        (TransformerXLConfig, "n_layer", 0, 1),
        (TransformerXLConfig, "n_head", 0, 1),
        (TransformerXLConfig, "memory_length", -1, 0),
        (TransformerXLConfig, "memory_length", 1.5, 0),
        (TransformerXLConfig, "memory_length", None, 0),
        (TransformerXLConfig, "clamp_distance", -1, 0),
        (TransformerXLConfig, "d_hidden", None, 1),
        (LSTMConfig, "layers_before", 0, 1),
        (LSTMConfig, "layers_after", 1.5, 1),
    ],
)
def test_sizes_of_one(config, field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be a whole number >= {least}, got {value}"):
        config(**{field: value})


@pytest.mark.parametrize(
    ("config", "field"),
    [(config, "dropout") for config in ALL]
    + [(TransformerXLConfig, "hidden_dropout"), (TransformerXLConfig, "attention_dropout")],
)
def test_dropouts_are_probabilities(config, field):
    with pytest.raises(ValueError, match=f"{field} must be at most 1, got 1.5"):
        config(**{field: 1.5})
    with pytest.raises(ValueError, match=f"{field} must be a finite number >= 0, got -0.1"):
        config(**{field: -0.1})


@pytest.mark.parametrize("config", [TransformerXLConfig, LSTMConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": (10, 30), "div_value": 16.0, "d_model": 8}, "d_model must be at least div_value .. 2"),
        ({"div_value": 0}, "div_value must be a finite number >= 1, got 0"),
        *[({"cutoffs": wrong}, "rising whole numbers from 1 to 255") for wrong in ((9, 9), (0,), (256,), (9.5,))],
    ],
)
def test_clusters_have_tokens_and_width(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("base", [0, -3.0, float("nan")])
def test_the_rotary_base(base):
    with pytest.raises(ValueError, match="rotary_base must be a finite number >= 1"):
        GPTConfig(rotary_base=base)


@pytest.mark.parametrize(("n_head", "d_model"), [(3, 8), (1, 7)])
def test_a_transformer_xl_s_width_is_even_and_divides_by_its_heads(n_head, d_model):
    with pytest.raises(ValueError, match=f"d_model must be even and a multiple of n_head={n_head}; got {d_model}"):
        TransformerXLConfig(n_head=n_head, d_model=d_model)
