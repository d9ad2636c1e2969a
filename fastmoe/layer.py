"""`MoE`: the only place where router, dispatcher, experts and kernels meet."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._device import on_device
from fastmoe._errors import check_int, unknown_name
from fastmoe._multiplier import read_multiplier
from fastmoe._processes import ALONE, CollectiveError, Processes
from fastmoe.dispatch import AllToAllDispatcher, LocalDispatcher, RoutedRows, Slices, from_slots, to_slots
from fastmoe.experts import (
    ActivationLike,
    ExpertLike,
    MLPExperts,
    ModuleExperts,
    SharedExpert,
    build_experts,
    reset_where_possible,
)
from fastmoe.monitor import LayerStats, mean_entropy
from fastmoe.routers import Router, Routing, RoutingContext, SoftRouting, check_routing, get_router, option_names

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RouterLike = str | nn.Module | Callable[[int, int, int], nn.Module]


class LossSink(Protocol):
    """Takes a layer's balance losses in the layer's stead; see `fastmoe.collect_aux_losses`."""

    def receive(self, layer: "MoE", losses: dict[str, Tensor]) -> None: ...


class Observer(Protocol):
    """Watches a layer's forward passes; see `fastmoe.LoadMonitor`."""

    def observe(self, routing: Routing | SoftRouting, offsets_E: Tensor, token_mask_T: Tensor | None) -> None: ...


class MoE(nn.Module):
    """A Mixture-of-Experts layer: a router sends each token to K of E experts and sums what they return.

    `y = sum over the chosen experts e of weight_e(x) * expert_e(x)`, plus the shared expert where there is one. Every
    routed row is computed: unless the router has a capacity, nothing is dropped or padded. In training the router's
    balance losses are attached to the output's autograd graph: their gradient flows, the output's value is untouched,
    user code does nothing.

    Args:
        d_model: D, width of the tokens.
        num_experts: E.
        top_k: K, experts chosen per token.
        d_hidden: H, hidden width of each built-in expert; 4 * d_model if None.
        activation: relu, gelu, gelu_tanh, silu; gated: swiglu, geglu, geglu_tanh, reglu; or any callable.
        bias: whether built-in experts have biases.
        dropout: probability, on the hidden activations of built-in experts, in training.
        expert: experts of one's own, each `(rows, d_model) -> (rows, d_out)`. A callable without arguments, called E
            times; or one module, deep-copied E times and re-initialised where it can; or a list of E modules or
            callables, which may differ in kind.
        router: a name in `fastmoe.routers.ROUTERS`; or a module `x_TD -> fastmoe.Routing`; or a callable
            `(d_model, num_experts, top_k) -> module`.
        router_options: keyword arguments for a router given by name.
        shared_d_hidden: hidden width of an expert that every token goes through; 0 for none.
        backend: "auto", or a name in `fastmoe.backends()`.
        check: debug mode: look at the router's numbers in every pass and raise on ids out of range, NaN or infinity.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument that does not fit; the message says what was expected and what came.

    Example:
        >>> layer = MoE(d_model=512, num_experts=64, top_k=2, d_hidden=1024)
        >>> layer(torch.randn(4, 128, 512)).shape
        torch.Size([4, 128, 512])
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        d_hidden: int | None = None,
        activation: ActivationLike = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        expert: ExpertLike | None = None,
        router: RouterLike = "topk",
        router_options: dict[str, Any] | None = None,
        shared_d_hidden: int = 0,
        backend: str = "auto",
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model, 1)
        self.num_experts = check_int("num_experts", num_experts, 1)
        self.top_k = check_int("top_k", top_k, 1)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts, got top_k={top_k} of {num_experts} experts")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        self.backend, self.check = kernels.check_backend(backend), check
        self.dispatcher: LocalDispatcher | AllToAllDispatcher = LocalDispatcher(num_experts, backend)
        self.slices: Slices | None = None
        self.aux_loss_scale: float | Tensor = 1.0
        self.last_stats: LayerStats | None = None
        self.loss_sink: LossSink | None = None
        self.observers: list[Observer] = []
        self.stats_group: ProcessGroup | None = None
        self.token_ids: Tensor | None = None
        self.token_mask: Tensor | None = None
        mlp: dict[str, Any] = {"activation": activation, "bias": bias, "dropout": dropout}
        with on_device(device):
            self.router = _build_router(router, router_options, d_model, num_experts, top_k).to(device, dtype)
            self.experts: MLPExperts | ModuleExperts
            if expert is None:
                hidden = 4 * d_model if d_hidden is None else d_hidden
                experts = MLPExperts(num_experts, d_model, hidden, **mlp, backend=backend, dtype=dtype)
                self.experts = experts.to(device, dtype)  # a module given as activation moves too
            else:
                if not shared_d_hidden and (activation != "gelu" or not bias):
                    raise ValueError(
                        "activation and bias are for built-in experts and the shared expert: leave them out where "
                        "expert= is given"
                    )
                if d_hidden is not None or dropout:
                    raise ValueError(
                        "d_hidden and dropout are for built-in experts: leave them out where expert= is given"
                    )
                self.experts = ModuleExperts(build_experts(expert, num_experts), backend).to(device, dtype)
            self.shared: SharedExpert | None = None
            if check_int("shared_d_hidden", shared_d_hidden, 0):
                self.shared = SharedExpert(d_model, shared_d_hidden, **mlp).to(device, dtype)

    def reset_parameters(self) -> None:
        """Initialise router, experts and shared expert anew, as after construction."""
        reset_where_possible(self.router)
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(self, x: Tensor, token_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Route, compute and sum.

        Args:
            x: `(..., d_model)`, floating; leading dimensions are free, and may be empty.
            token_mask: bool, shaped like `x` without its last dimension. A False token is not routed, gets zeros, and
                counts in no loss and no statistic.
            token_ids: int64, shaped like `token_mask`: the vocabulary id of each token, for routers that go by it.

        Returns:
            `(..., d_model)` in the dtype of `x` (under autocast, in the autocast dtype); `(..., d_out)` with experts
            of one's own.

        Raises:
            ValueError: wrong width, dtype or mask; a router whose answer does not fit.
        """
        self._check(x, token_mask)
        ids = self._token_ids_of(x, token_ids) if getattr(self.router, "needs_token_ids", False) else None
        further = (token_mask, ids, self._counted(x, token_mask))
        if self.slices is None:
            return self._forward(x, *further)
        whole = x.unsqueeze(0) if x.dim() == 1 else x
        shape = whole.shape[:-1]
        taken = [None if t is None else self.slices.take(t.view(shape)) for t in further]
        y = self.slices.gather(self._forward(self.slices.take(whole), *taken), len(whole))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _forward(
        self, x: Tensor, token_mask: Tensor | None, token_ids: Tensor | None, counted: Tensor | None
    ) -> Tensor:
        x_TD = x.reshape(-1, self.d_model)
        mask_T, counted_T = (None if mask is None else mask.reshape(-1) for mask in (token_mask, counted))
        if mask_T is not None:
            x_TD = torch.where(mask_T.unsqueeze(1), x_TD, 0)
        context = self._context(x, counted_T, token_ids, padding_is_computed=mask_T is None)
        routing, entropy = self._route(x_TD, mask_T, context)
        if isinstance(routing, SoftRouting):
            if self.slices is not None and x.dim() == 2:
                raise ValueError("with tp='slice' a router of whole sequences needs x of (sequences, length, d_model)")
            y_TO, offsets_E = self._compute_soft(x_TD, routing)
        else:
            y_TO, offsets_E = self._compute(x_TD, routing)
        if self.shared is not None:
            shared_TO = self.shared(x_TD)
            y_TO = y_TO + (shared_TO if mask_T is None else torch.where(mask_T.unsqueeze(1), shared_TO, 0))
        losses = {name: loss.detach() for name, loss in routing.losses.items()}
        self.last_stats = LayerStats(offsets_E, routing.dropped, losses, entropy)
        for observer in self.observers:
            observer.observe(routing, offsets_E, counted_T)
        return y_TO if x.dim() == 2 else y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])

    def _counted(self, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Which tokens count in losses and statistics: those of the mask, or of one for as many tokens that a model
        left for its layers.
        """
        fed, shape = self.token_mask, x.shape[:-1]
        if token_mask is not None or fed is None or fed.numel() != math.prod(shape):
            return token_mask
        return fed.reshape(shape)

    def _check(self, x: Tensor, token_mask: Tensor | None) -> None:
        if not x.is_floating_point():
            raise ValueError(f"x must be floating, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (..., {self.d_model}), got {tuple(x.shape)}")
        if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]):
            raise ValueError(
                f"token_mask must be bool {tuple(x.shape[:-1])}, got {token_mask.dtype} {tuple(token_mask.shape)}"
            )

    def _context(
        self, x: Tensor, counted_T: Tensor | None, token_ids: Tensor | None, padding_is_computed: bool
    ) -> RoutingContext:
        processes = Processes.of(self.stats_group) if self.training else ALONE
        ids_T = None if token_ids is None else token_ids.reshape(-1)
        num_sequences = math.prod(x.shape[:-2])
        return RoutingContext(counted_T, ids_T, num_sequences, processes, self.backend, padding_is_computed)

    def _token_ids_of(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        ids = self.token_ids if token_ids is None else token_ids
        name = type(self.router).__name__
        if ids is None:
            raise ValueError(
                f"{name} goes by token ids: call the layer with token_ids=, or fastmoe.feed_token_ids(model, embedding)"
            )
        same_dim, count = ids.dim() == x.dim() - 1, math.prod(x.shape[:-1])
        fits = ids.shape == x.shape[:-1] if same_dim else ids.numel() == count
        if ids.dtype != torch.int64 or not fits:
            raise ValueError(
                f"token_ids must be int64 {tuple(x.shape[:-1])}, one for each token; got {ids.dtype} {tuple(ids.shape)}"
            )
        return ids.reshape(x.shape[:-1])

    def _route(
        self, x_TD: Tensor, mask_T: Tensor | None, context: RoutingContext
    ) -> tuple[Routing | SoftRouting, Tensor | None]:
        """The router's checked answer for all T tokens, and the mean entropy of its scores."""
        counted_T = context.token_mask_T
        routing: Routing | SoftRouting
        if getattr(self.router, "takes_context", False):
            try:
                answer = self.router(x_TD, context)
            except CollectiveError as error:
                raise CollectiveError(f"{self.dispatcher.place(routed=False)}: its router's {error}") from error
            routing = self._checked(answer, len(x_TD))
            if mask_T is not None:
                routing = routing.masked(mask_T)
        elif mask_T is None:
            routing = self._checked(self.router(x_TD), len(x_TD))
        else:
            routing, counted_T = self._route_kept(x_TD, mask_T), None
        return routing, None if routing.scores_TE is None else mean_entropy(routing.scores_TE, counted_T)

    def _route_kept(self, x_TD: Tensor, mask_T: Tensor) -> Routing:
        """The answer of a router that knows no padding, asked for the tokens that are not."""
        kept_T = mask_T.nonzero().flatten()
        compact = self._checked(self.router(x_TD[kept_T]), len(kept_T))
        if isinstance(compact, SoftRouting):
            raise ValueError("a router that answers a SoftRouting must set takes_context, to know padding")
        token_ids_N = kept_T[compact.token_ids_N]
        return dataclasses.replace(compact, token_ids_N=token_ids_N, num_tokens=len(x_TD), rows_per_token=0)

    def _checked(self, routing: Routing | SoftRouting, num_tokens: int) -> Routing | SoftRouting:
        check_routing(routing, num_tokens, self.num_experts, check_ids=self.check, check_finite=self.check)
        return routing

    def _compute(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """`(T, O)`, each token's weighted sum, and where each expert's rows ended, int32 `(E,)`."""
        weights_N = self._hand_over_losses(routing)
        rows = RoutedRows(routing.token_ids_N, routing.expert_ids_N, weights_N, routing.rows_per_token)
        return self._run(x_TD, rows)

    def _compute_soft(self, x_TD: Tensor, routing: SoftRouting) -> tuple[Tensor, Tensor]:
        """As `_compute`; every expert computes all its slots."""
        slots_LD = to_slots(x_TD, routing.dispatch_BSL, self.num_experts)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        expert_ids_L = experts_E.repeat_interleave(len(slots_LD) // self.num_experts)
        y_LO, offsets_E = self._run(slots_LD, RoutedRows.one_each(expert_ids_L, x_TD.dtype))
        return from_slots(y_LO, routing.combine_BSL, self.num_experts), offsets_E

    def _run(self, x_TD: Tensor, rows: RoutedRows) -> tuple[Tensor, Tensor]:
        return self.experts(x_TD, self.dispatcher.run, rows)

    def _hand_over_losses(self, routing: Routing) -> Tensor:
        """The routing weights, with the balance losses attached unless a sink takes them."""
        if self.loss_sink is not None:
            self.loss_sink.receive(self, dict(routing.losses))
        elif self.training and routing.losses:
            return _AttachLoss.apply(routing.weights_N, sum(routing.losses.values()), self.aux_loss_scale)
        return routing.weights_N

    def __getstate__(self) -> dict[str, Any]:
        left = ("last_stats", "loss_sink", "stats_group", "token_ids", "token_mask")
        return self.__dict__ | dict.fromkeys(left) | {"observers": []}

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}, backend={self.backend!r}"


class _AttachLoss(torch.autograd.Function):
    """The identity on the routing weights; in backward the loss gets the gradient `scale`.

    The weights are on the way of every gradient from the output, so the loss is differentiated exactly once whenever
    the output is, also when the forward pass is recomputed. Nothing is saved, so that recomputing a pass with the
    losses attached matches a pass that handed them over.
    """

    @staticmethod
    def forward(weights_N: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        return weights_N.view_as(weights_N)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _weights_N, loss, ctx.scale = inputs
        ctx.like = torch.empty((), dtype=loss.dtype, device=loss.device)

    @staticmethod
    def backward(ctx, grad_N: Tensor):  # type: ignore[no-untyped-def]
        if isinstance(ctx.scale, Tensor):
            return grad_N, read_multiplier(ctx.scale, grad_N, ctx.like), None
        return grad_N, torch.full_like(ctx.like, ctx.scale), None


def _build_router(
    router: RouterLike, options: dict[str, Any] | None, d_model: int, num_experts: int, top_k: int
) -> nn.Module:
    if options and not isinstance(router, str):
        raise ValueError("router_options are for a router given by name; give yours its options itself")
    if isinstance(router, str):
        cls = get_router(router)
        known = option_names(cls)
        for option in options or {}:
            if option not in known:
                raise unknown_name(f"option of router {router!r}", option, known)
        return cls(d_model, num_experts, top_k, **(options or {}))
    module = router(d_model, num_experts, top_k) if callable(router) and not isinstance(router, nn.Module) else router
    if not isinstance(module, nn.Module):
        raise ValueError(f"router must be a name, a module or a callable that returns a module, got {module!r}")
    if isinstance(module, Router):
        asked, has = (d_model, num_experts, top_k), (module.d_model, module.num_experts, module.top_k)
        if asked != has:
            raise ValueError(f"the layer has (d_model, num_experts, top_k) = {asked}, its router has {has}")
    return module
