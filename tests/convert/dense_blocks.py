"""Feed-forward blocks in the manners of many code bases, written for these tests."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, P = 12, 20, 0.25


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class NewGELU(nn.Module):
    """GELU's tanh form, spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Plain(nn.Module):
    """Two matrices with the names `up` and `down`, and dropouts where they are asked for."""

    def __init__(
        self,
        up: str,
        down: str,
        act: Callable[[Tensor], Tensor],
        inner: float | None = None,
        output: float | None = None,
        bias: tuple[bool, bool] = (True, True),
        linear: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.names = up, down
        if linear is Conv1D:
            self.add_module(up, Conv1D(H, D))
            self.add_module(down, Conv1D(D, H))
        else:
            self.add_module(up, nn.Linear(D, H, bias=bias[0]))
            self.add_module(down, nn.Linear(H, D, bias=bias[1]))
        self.act = act
        self.drop1 = None if inner is None else nn.Dropout(inner)
        self.drop2 = None if output is None else nn.Dropout(output)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (getattr(self, name) for name in self.names)
        h = self.act(up(x))
        y = down(h if self.drop1 is None else self.drop1(h))
        return y if self.drop2 is None else self.drop2(y)


class Gated(nn.Module):
    """Three matrices; the activation is called by name, as in the Llama reference code."""

    def __init__(
        self,
        gate: str,
        up: str,
        down: str,
        act: Callable[[Tensor], Tensor],
        inner: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.nonlinear = (gate, up, down), act
        self.add_module(gate, nn.Linear(D, H, bias=bias))
        self.add_module(down, nn.Linear(H, D, bias=bias))
        self.add_module(up, nn.Linear(D, H, bias=bias))
        self.dropout = None if inner is None else nn.Dropout(inner)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        h = self.nonlinear(gate(x)) * up(x)
        return down(h if self.dropout is None else self.dropout(h))


class FusedGate(nn.Module):
    """Phi-3's: gate and up in one matrix, the gate's half first, or last in a look-alike."""

    def __init__(self, bias: bool = False, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * H, bias=bias), nn.Linear(H, D, bias=bias)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up if self.gate_first else F.silu(up) * gate)


class OneDropoutTwice(nn.Module):
    """Older timm: the same dropout after the activation and at the end; the activation is a string's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop, self.norm = nn.Linear(D, H), nn.Linear(H, D), nn.Dropout(P), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.norm(self.drop(F.silu(self.fc1(x))))))


class ReluSquared(nn.Module):
    """nanochat's: no activation module at all; its second matrix starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


@dataclass(frozen=True)
class Case:
    """A dense block, and what its MoE is to have. `activation` None: a callable."""

    make: Callable[[], nn.Module]
    activation: str | None
    inner: float = 0.0
    output: float | None = None


def _sequential(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), *extra, nn.Linear(H, D))


CASES = {
    "nanogpt": Case(lambda: Plain("c_fc", "c_proj", nn.GELU(), output=P), "gelu", 0.0, P),
    "nanogpt_no_bias": Case(lambda: Plain("c_fc", "c_proj", nn.GELU(), bias=(False, False)), "gelu"),
    "nanochat": Case(ReluSquared, None),
    "gpt2": Case(lambda: Plain("c_fc", "c_proj", NewGELU(), output=P, linear=Conv1D), "gelu_tanh", 0.0, P),
    "clip": Case(
        lambda: nn.Sequential(
            OrderedDict(c_fc=nn.Linear(D, H), gelu=nn.GELU(approximate="tanh"), c_proj=nn.Linear(H, D))
        ),
        "gelu_tanh",
    ),
    "timm": Case(lambda: Plain("fc1", "fc2", nn.GELU(), inner=P, output=0.5), "gelu", P, 0.5),
    "timm_old": Case(OneDropoutTwice, "silu", P, P),
    "gptj": Case(lambda: Plain("fc_in", "fc_out", NewGELU(), output=0.0), "gelu_tanh", 0.0, 0.0),
    "t5": Case(lambda: Plain("wi", "wo", nn.ReLU(), inner=P, bias=(False, False)), "relu", P),
    "t5_gated": Case(lambda: Gated("wi_0", "wi_1", "wo", NewGELU(), inner=P), "geglu_tanh", P),
    "neox": Case(lambda: Plain("dense_h_to_4h", "dense_4h_to_h", F.gelu), "gelu"),
    "nemotron": Case(lambda: Plain("up_proj", "down_proj", lambda x: F.relu(x) ** 2), None),
    "llama": Case(lambda: Gated("gate_proj", "up_proj", "down_proj", nn.SiLU()), "swiglu"),
    "phi3": Case(FusedGate, "swiglu"),
    "phi3_bias": Case(lambda: FusedGate(bias=True), "swiglu"),
    "gemma": Case(lambda: Gated("gate_proj", "up_proj", "down_proj", F.gelu), "geglu"),
    "llama_reference": Case(lambda: Gated("w1", "w3", "w2", F.silu), "swiglu"),
    "xformers": Case(lambda: Gated("w1", "w2", "w3", F.silu, bias=True), "swiglu"),
    "relu_gate": Case(lambda: Gated("w1", "w2", "w3", torch.relu), "reglu"),
    "annotated": Case(lambda: Plain("w_1", "w_2", torch.relu, inner=P), "relu", P),
    "distilbert": Case(lambda: Plain("lin1", "lin2", F.gelu, output=P), "gelu", 0.0, P),
    "linear1": Case(lambda: Plain("linear1", "linear2", F.silu), "silu"),
    "only_up_bias": Case(lambda: Plain("fc1", "fc2", F.relu, bias=(True, False)), "relu"),
    "only_down_bias": Case(lambda: Plain("fc1", "fc2", F.relu, bias=(False, True)), "relu"),
    "other_activation": Case(lambda: Plain("fc1", "fc2", nn.LeakyReLU(0.3)), None),
    "other_function": Case(lambda: Plain("fc1", "fc2", torch.tanh), None),
    "sequential": Case(_sequential, "relu"),
    "sequential_dropouts": Case(lambda: _sequential(nn.Dropout(P)).append(nn.Dropout(0.5)), "relu", P, 0.5),
}


class Residual(nn.Module):
    """A look-alike: the skip connection is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class NormBetween(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.relu(self.fc1(x))))


class PlainNormBetween(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.layer_norm(F.relu(self.fc1(x)), (H,)))


class FunctionalDropout(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5, self.training))


class DropoutFirst(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(P)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.dropout(x))))


class SqueezeExcite(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x))))


class TokenShift(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.roll(1, dims=-2))))


class TwoArguments(Residual):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc2(F.relu(self.fc1(x))) * scale


class ClippedRelu(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class GateLast(FusedGate):
    def __init__(self) -> None:
        super().__init__(gate_first=False)


LOOK_ALIKES = {
    Residual: "does not compute",
    NormBetween: "parameters or buffers besides",
    PlainNormBetween: "does not compute",
    FunctionalDropout: "does not compute",
    DropoutFirst: "does not compute",
    SqueezeExcite: "does not compute",
    TokenShift: "does not compute",
    TwoArguments: "more than one argument (scale)",
    ClippedRelu: "does not compute",
    GateLast: "does not compute",
}


class Network(nn.Module):
    """Residual blocks around `make()`, so that a network has several."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(D), "mlp": make()}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["mlp"](block["norm"](x))
        return x
