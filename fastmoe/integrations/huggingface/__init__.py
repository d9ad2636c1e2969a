"""fastmoe inside Hugging Face transformers."""

from fastmoe.integrations.huggingface import config, expert_parallel, experts
from fastmoe.integrations.huggingface.adopt import adopt
from fastmoe.integrations.huggingface.native import to_native

config.register()
experts.register()
expert_parallel.register()

__all__ = ["adopt", "to_native"]
