"""How much each task of a multi-gate layer used each expert."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskStats:
    """Statistics of one forward pass of `fastmoe.MMoE`. They stay on the device; reading a property waits for it.

    Attributes:
        mean_weights: of each level, floating `(num_tasks, E)`, detached: the mean over tokens of the task's gate
            weights. Experts stand as in the layer: the shared ones, then those of task 0, of task 1 and so on; a
            task's weight of another task's expert is 0.
    """

    mean_weights: tuple[Tensor, ...]

    @property
    def utilization(self) -> Tensor:
        """Mean gate weight by level, task and expert, float32 `(L, num_tasks, E)`, on the CPU.

        Each task's weights sum to 1 in each level; all 0 where there was no token.
        """
        return torch.stack(self.mean_weights).float().cpu()

    def __str__(self) -> str:
        lines = []
        for level, weights_KE in enumerate(self.utilization.tolist()):
            for task, weights in enumerate(weights_KE):
                shares = ", ".join(f"{weight:.1%}" for weight in weights)
                lines.append(f"level {level}, task {task}: {shares}")
        return "\n".join(lines)
