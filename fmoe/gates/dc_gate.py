"""`DCGate`: two experts, a capacity over all workers."""

from torch import Tensor

from fmoe.gates.capacity_gate import TopTwoGate


class DCGate(TopTwoGate):
    """As `GShardGate`, but an expert counts the rows that all workers send it, lower ranks first.

    It takes `ceil(capacity * 2T / E)` for T tokens in all workers together. Arguments: see `TopTwoGate`.
    """

    def limit(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.prune(expert_ids_TK, weights_TK, self.sharers())
