"""What one `moefy` call asks for, checked once and applied to every block."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmoe._errors import check_int, unknown_name
from fastmoe.layer import MoE

INITS = ("upcycle", "random")


class DropoutMoE(MoE):
    """A MoE followed by the dropout that ended the dense block."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, output_dropout: nn.Module, **options: Any):
        super().__init__(d_model, num_experts, top_k, **options)
        self.output_dropout = output_dropout

    def forward(self, x: Tensor, token_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        return self.output_dropout(super().forward(x, token_mask, token_ids))


@dataclass(frozen=True)
class Recipe:
    """What the user asked for: the same for every block of one `moefy` call."""

    num_experts: int
    top_k: int
    init: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        check_int("num_experts", self.num_experts, 1)
        check_int("top_k", self.top_k, 1)
        if self.init not in INITS:
            raise unknown_name("init", self.init, INITS)
        known = [p.name for p in inspect.signature(MoE).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in self.options:
            if name not in known and name != "d_model":
                raise unknown_name("moefy option", name, ["target", "init", "every", "d_model", *known])
        if self.upcycles and self.options.get("expert") is not None:
            raise ValueError("init='upcycle' makes the experts from the dense block; give expert= with init='random'")
        if self.upcycles and self.options.get("router") == "soft":
            raise ValueError(
                "init='upcycle' keeps the model's outputs, and a soft router gives experts means of tokens in their "
                "place; use router='soft' with init='random'"
            )

    @property
    def upcycles(self) -> bool:
        return self.init == "upcycle"

    def make(self, d_model: int, defaults: dict[str, Any], output_dropout: nn.Module | None = None) -> MoE:
        """A MoE with the user's options over `defaults`. Modules among them are copied: no two layers share one."""
        options = defaults | {
            name: copy.deepcopy(value) if isinstance(value, nn.Module | list | tuple) else value
            for name, value in self.options.items()
            if value is not None and name != "d_model"
        }
        if self.upcycles:
            options["router_options"] = self._router_options()
        if output_dropout is None:
            return MoE(d_model, self.num_experts, self.top_k, **options)
        return DropoutMoE(d_model, self.num_experts, self.top_k, output_dropout=output_dropout, **options)

    def _router_options(self) -> dict[str, Any] | None:
        """Routing weights must sum to 1 for the MoE to give what the dense block gave."""
        given = self.options.get("router_options")
        if self.options.get("router", "topk") != "topk":
            return given
        options = dict(given or {})
        if options.get("normalize", True) is False:
            raise ValueError(
                "init='upcycle' keeps the model's outputs, for which a token's routing weights must sum to 1; "
                "got router_options normalize=False. Leave it out, or use init='random'"
            )
        if self.top_k == 1:
            options.setdefault("normalize", "stop_gradient")
        return options
