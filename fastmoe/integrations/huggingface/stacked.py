"""The experts of one MoE block as `fastmoe.MoE` stacks them: the form that all layouts are read into."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class StackedExperts:
    """Weights of E experts of width D and hidden width H.

    Args:
        w1: (E, 2H, D), gate half first; without a gate (E, H, D).
        w2: (E, D, H).
        b1, b2: (E, 2H) or (E, H), and (E, D); None where experts have no biases.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.w1.shape[1] == 2 * self.w2.shape[2]

    def check(self, router_ED: Tensor, gated: bool | None) -> None:
        """`ValueError` unless all shapes fit each other and the router's (E, D); `gated` None: with a gate or not."""
        num_experts, d_model = router_ED.shape
        d_hidden = self.w2.shape[-1]
        widths = {True: [2 * d_hidden], False: [d_hidden], None: [2 * d_hidden, d_hidden]}[gated]
        expected: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
            ("w1", self.w1, [(num_experts, width, d_model) for width in widths]),
            ("w2", self.w2, [(num_experts, d_model, d_hidden)]),
            ("b1", self.b1, [(num_experts, self.w1.shape[1])]),
            ("b2", self.b2, [(num_experts, d_model)]),
        ]
        for name, tensor, shapes in expected:
            if tensor is not None and tensor.shape not in shapes:
                raise ValueError(
                    f"with a router {tuple(router_ED.shape)} and a hidden width {d_hidden} the experts' {name} must be "
                    f"{' or '.join(map(str, shapes))} when stacked as in fastmoe, got {tuple(tensor.shape)}"
                )

    def transposed(self) -> "StackedExperts":
        """The matrices as (E, in, out); called again, as they were."""
        return replace(self, w1=self.w1.transpose(1, 2), w2=self.w2.transpose(1, 2))

    def alternated(self) -> "StackedExperts":
        """Outputs of gate and up taking turns, instead of all of the gate first."""
        return self._regrouped(2, -1)

    def halved(self) -> "StackedExperts":
        """What `alternated` was called on."""
        return self._regrouped(-1, 2)

    def _regrouped(self, *sizes: int) -> "StackedExperts":
        def regroup(tensor: Tensor) -> Tensor:
            return tensor.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)

        return replace(self, w1=regroup(self.w1), b1=None if self.b1 is None else regroup(self.b1))
