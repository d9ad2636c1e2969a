"""Tiny dense models of transformers, each from a config, with weights large enough for errors to show."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

VOCAB, LENGTH = 97, 9
ENCODER_DECODER = ("bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus", "plbart", "t5")


@dataclass(frozen=True)
class Dense:
    """A model type: the Auto class to build it by, and what its config is given besides `COMMON`, None to leave out."""

    auto: str = "AutoModelForCausalLM"
    config: dict[str, Any] = field(default_factory=dict)


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_TEXT = {**COMMON, "projection_dim": 16, "hidden_act": "quick_gelu"}
CLIP_VISION = {**CLIP_TEXT, "image_size": 8, "patch_size": 4}
BART = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MASKED, SEQ2SEQ = "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"

DENSE = {
    "gpt2": Dense(config={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": Dense(),
    "mistral": Dense(config={"sliding_window": None}),
    "qwen2": Dense(),
    "qwen3": Dense(config={"head_dim": 8}),
    "gemma": Dense(config={"head_dim": 8}),
    "gemma2": Dense(config={"head_dim": 8}),
    "gpt_neox": Dense(),
    "opt": Dense(config={"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": Dense(),
    "phi3": Dense(),
    "bert": Dense(MASKED),
    "roberta": Dense(MASKED, {"pad_token_id": 1, "max_position_embeddings": 66}),
    "t5": Dense(SEQ2SEQ, T5),
    "vit": Dense("AutoModelForImageClassification", {"image_size": 8, "patch_size": 4}),
}
MORE = {
    "bart": Dense(SEQ2SEQ, BART),
    "bert-generation": Dense(),
    "biogpt": Dense(),
    "blenderbot": Dense(SEQ2SEQ, BART),
    "camembert": Dense(MASKED, {"pad_token_id": 1, "max_position_embeddings": 66}),
    "data2vec-text": Dense(MASKED, {"pad_token_id": 1, "max_position_embeddings": 66}),
    "deberta": Dense(MASKED),
    "deberta-v2": Dense(MASKED),
    "distilbert": Dense(MASKED, {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}),
    "electra": Dense(MASKED, {"embedding_size": 32}),
    "ernie": Dense(MASKED),
    "glm": Dense(config={"head_dim": 8}),
    "gpt_neo": Dense(config={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gptj": Dense(config={"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "layoutlm": Dense(MASKED),
    "m2m_100": Dense(SEQ2SEQ, BART),
    "marian": Dense(SEQ2SEQ, BART),
    "mbart": Dense(SEQ2SEQ, BART),
    "megatron-bert": Dense(MASKED),
    "mpnet": Dense(MASKED, {"pad_token_id": 1}),
    "nemotron": Dense(config={"head_dim": 8}),
    "pegasus": Dense(SEQ2SEQ, BART),
    "plbart": Dense(SEQ2SEQ, BART),
    "rembert": Dense(MASKED, {"input_embedding_size": 32, "output_embedding_size": 32}),
    "roformer": Dense(MASKED, {"embedding_size": 32}),
    "stablelm": Dense(),
    "starcoder2": Dense(),
    "xglm": Dense(config={"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.0}),
    "xlm-roberta": Dense(MASKED, {"pad_token_id": 1, "max_position_embeddings": 66}),
}


def make(model_type: str, auto: str | None = None, **config: Any) -> PreTrainedModel:
    """A dense model in evaluation, its parameters moved off their starting values."""
    row = (DENSE | MORE)[model_type]
    given = {name: value for name, value in (COMMON | row.config | config).items() if value is not None}
    dense = CONFIG_MAPPING[model_type](**given)
    model = getattr(transformers, auto or row.auto).from_config(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's positions are not, and are not saved
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model_type: str, labels: bool = False, batch: int = 2) -> dict[str, torch.Tensor]:
    """A batch for a model of this type."""
    if model_type == "vit":
        images = {"pixel_values": torch.randn(batch, 3, 8, 8)}
        return images | ({"labels": torch.randint(0, 2, (batch,))} if labels else {})
    ids = torch.randint(5, VOCAB, (batch, LENGTH))
    given = {"input_ids": ids}
    if model_type in ENCODER_DECODER:
        given["decoder_input_ids"] = torch.randint(5, VOCAB, (batch, 5))
    if labels:
        given["labels"] = given.get("decoder_input_ids", ids)
    return given


def llava() -> PreTrainedModel:
    """A text model and a vision model in one, tiny; its batches are those of LLaMA."""
    text = make("llama", vocab_size=128).config.to_dict()
    vision = CLIP_VISION | {"model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=100)
    return transformers.LlavaForConditionalGeneration(config)
