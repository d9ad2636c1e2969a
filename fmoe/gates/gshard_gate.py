"""`GShardGate`: two experts, a capacity within each worker."""

from torch import Tensor

from fmoe.gates.capacity_gate import TopTwoGate


class GShardGate(TopTwoGate):
    """GShard (Lepikhin et al. 2020, 2006.16668): each worker may send each expert so many of its own rows.

    That is `ceil(capacity * 2T / E)` for T tokens in this worker and E experts in all. Arguments: see `TopTwoGate`.
    """

    def limit(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.prune(expert_ids_TK, weights_TK)
