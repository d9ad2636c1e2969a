"""fastmoe inside Hugging Face transformers."""

from importlib.metadata import version

if tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 17):
    raise ImportError(f"fastmoe needs transformers 5.17 or later, found {version('transformers')}")

from fastmoe.integrations.huggingface import config, expert_parallel, experts
from fastmoe.integrations.huggingface.adopt import adopt
from fastmoe.integrations.huggingface.native import to_native
from fastmoe.integrations.huggingface.registry import register_models

config.register(register_models)
experts.register()
expert_parallel.register()

__all__ = ["adopt", "to_native"]
