"""`RoutingContext`: what a router may know of a batch besides its tokens."""

from dataclasses import dataclass

from torch import Tensor

from fastmoe._processes import ALONE, Processes


@dataclass(frozen=True)
class RoutingContext:
    """Handed by the layer to a router whose class says `takes_context`.

    Attributes:
        token_mask_T: bool; False tokens are padding: they count in no loss, capacity or statistic, and what the
            router answers for them is ignored, unless `padding_is_computed`. None: every token counts.
        padding_is_computed: padding gets experts as far as the router has no limits, so that outputs there are those
            of a pass without a mask.
        token_ids_T: int64, the vocabulary id of each token, where the layer was told.
        num_sequences: the tokens are that many sequences of one length, one after another.
        processes: those that share this batch in training; in evaluation always this one alone, so that one process
            may evaluate while others do not.
        backend: the layer's, for the router's own kernels.
    """

    token_mask_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    num_sequences: int = 1
    processes: Processes = ALONE
    backend: str = "auto"
    padding_is_computed: bool = False

    def counted(self, like_TE: Tensor) -> Tensor:
        """`(T,)` in the dtype of `like_TE`: 1 for tokens that count, 0 for padding."""
        if self.token_mask_T is None:
            return like_TE.new_ones(like_TE.shape[0])
        return self.token_mask_T.to(like_TE.dtype)

    def num_tokens(self, like_TE: Tensor) -> int | Tensor:
        """Tokens that count in this process: an int, or where there is a mask an int64 tensor on the device."""
        return like_TE.shape[0] if self.token_mask_T is None else self.token_mask_T.sum()
