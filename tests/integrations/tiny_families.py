"""Every MoE family of the installed transformers, as small as it builds: its experts class, and a model around it."""

import importlib
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastmoe.integrations.huggingface import experts as ours

MODELS = Path(transformers.__file__).parent / "models"
VOCABULARY = 61
MOST_PARAMETERS = 2_000_000

# Fields of configurations, by their names in any family.
SMALL = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 32,
    "moe_hidden_size": 32,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "n_groups": 2,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
# What a family needs besides: (field, value) by the name of its experts class.
MORE: dict[str, dict] = {
    "BeamExperts": {"mlp_layer_types": ["sparse", "sparse"]},
    "DeepseekOcr2TextExperts": {"mlp_layer_types": ["dense", "sparse"]},
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [48, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    "FlintExperts": {"mlp_only_layers": []},
    "Gemma4TextExperts": {"enable_moe_block": True},
    "Glm4vMoeTextExperts": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "Glm5NextTextExperts": {
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "HYV4VLExperts": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
    "Lfm2MoeExperts": {"layer_types": ["full_attention", "full_attention"]},
    "MiMoV2FlashExperts": {"head_dim": 24, "v_head_dim": 24, "num_key_value_heads": 2},
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 48},
    "ZayaExperts": {"num_experts_per_tok": 1},
}
# What an experts class is built from besides its configuration.
ARGUMENTS = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": 48}}
# Models that refuse token ids.
EMBEDDED = {"Qwen3OmniMoeTalkerModel"}


@dataclass(frozen=True)
class Family:
    """An experts class: `MixtralExperts` in `transformers.models.mixtral.modeling_mixtral`."""

    folder: str
    module: str
    name: str

    def __str__(self):
        return self.name.removesuffix("Experts")

    def imported(self, kind="modeling"):
        name = self.module if kind == "modeling" else self.module.replace("modeling_", f"{kind}_", 1)
        return importlib.import_module(f"transformers.models.{self.folder}.{name}")

    @property
    def experts_class(self):
        return getattr(self.imported(), self.name)


@cache
def families():
    """One for each class that transformers lets run on other experts implementations."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        decorated = len(re.findall(r"^@use_experts_implementation", path.read_text(encoding="utf-8"), re.MULTILINE))
        if not decorated:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        names = [n for n, c in vars(module).items() if _is_experts(c) and c.__module__ == module.__name__]
        assert len(names) == decorated, f"{path.stem}: {decorated} decorated classes, found {names}"
        found += [Family(path.parent.name, path.stem, name) for name in names]
    return found


def _is_experts(value):
    return isinstance(value, type) and issubclass(value, nn.Module) and hasattr(value, "_apply_gate")


def configs(family):
    """Small configurations of all kinds that the family has, those of texts first."""
    kinds = [c for c in vars(family.imported("configuration")).values() if _is_config(c, family)]
    for kind in sorted(kinds, key=lambda c: ("Text" not in c.__name__, c.__name__)):
        yield small(kind, family)


def _is_config(value, family):
    ours = isinstance(value, type) and issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig
    return ours and value.__module__.startswith(f"transformers.models.{family.folder}.")


def small(kind, family):
    known = {f.name for f in fields(kind)} | set(kind.attribute_map)
    given = {name: value for name, value in SMALL.items() if name in known and name not in kind.sub_configs}
    return kind(**given | MORE.get(family.name, {}))


def build_experts(family):
    """The experts class alone, with random parameters.

    Raises:
        LookupError: no configuration of the family builds it; with what each one ran into.
    """
    wrong = []
    for config in configs(family):
        try:
            experts = family.experts_class(config, **ARGUMENTS.get(family.name, {}))
        except (AttributeError, TypeError) as error:
            wrong.append(f"{type(config).__name__}: {error}")
            continue
        assert sum(p.numel() for p in experts.parameters()) < MOST_PARAMETERS, config
        return randomized(experts)
    raise LookupError("; ".join(wrong))


@torch.no_grad()
def randomized(module):
    """With every parameter random, so that zeros and equal numbers hide nothing."""
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module


def build_model(family):
    """A model with the family's experts, from whichever of its classes and configurations give one that runs.

    Raises:
        LookupError: none does; with what each one ran into.
    """
    wrong = []
    for config in configs(family):
        for kind in _model_classes(family, config):
            try:
                with torch.device("meta"):
                    model = kind._from_config(config, experts_implementation="eager")
                size = sum(p.numel() for p in model.parameters())
                if not any(type(m).__name__ == family.name for m in model.modules()):
                    raise LookupError("without these experts")
                if size > MOST_PARAMETERS:
                    raise LookupError(f"{size} parameters")
                model = randomized(kind._from_config(config, experts_implementation="eager"))
                outputs(model)
            except Exception as error:
                wrong.append(f"{kind.__name__}: {type(error).__name__}: {str(error)[:200]}")
                continue
            return model
    raise LookupError("\n".join(wrong))


def _model_classes(family, config):
    kinds = [c for c in vars(family.imported()).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    kinds = [c for c in kinds if c.config_class is type(config) and not c.__name__.endswith("PreTrainedModel")]
    return sorted(kinds, key=lambda c: (not c.__name__.endswith("ForCausalLM"), c.__name__))


def outputs(model, length=9):
    """Logits, or the last hidden states of a model without a head."""
    ids = torch.arange(2 * length).reshape(2, length) % (VOCABULARY - 3) + 3
    embedded = type(model).__name__ in EMBEDDED
    given = {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
    out = model(**given, use_cache=False)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def counting(seen):
    """Our function for experts, which adds to `seen` the modules that it is called for, but for traced calls."""

    def counted(self, *args):
        if not torch.compiler.is_compiling():
            seen.append(self)
        return ours.experts_forward(self, *args)

    return counted
