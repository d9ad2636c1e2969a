"""`LoadSnapshot`: the load of every layer over a window of training passes; plain numbers, no tensors."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LayerLoad:
    """One layer's passes in a window, over all processes.

    Attributes:
        counts: rows that each expert computed; demand: rows that chose it, before some were dropped.
        passes: forward passes, each process's counted.
        tokens: tokens routed or dropped, without masked ones; unrouted_tokens: those of them that no expert computed.
        dropped: choices dropped for lack of capacity.
        dead: experts without a row in the last `dead_after` passes, which may be more than the window has.
        mean_weight: of the computed rows; None without rows.
        router_entropy: mean over tokens of the entropy of the router's scores in nats; None without scores.
        losses: weighted balance losses by name, mean over passes.
    """

    counts: tuple[int, ...]
    demand: tuple[int, ...]
    passes: int
    tokens: int
    unrouted_tokens: int
    dropped: int
    dead: tuple[int, ...]
    mean_weight: float | None
    router_entropy: float | None
    losses: Mapping[str, float]

    @property
    def rows(self) -> int:
        """Rows that were computed."""
        return sum(self.counts)

    @property
    def share(self) -> tuple[float, ...]:
        """Share of the rows that each expert computed; sums to 1, all 0 where there was no row."""
        return tuple(count / max(self.rows, 1) for count in self.counts)

    @property
    def max_over_mean(self) -> float:
        """The busiest expert's rows over the mean; 1 is even, 0 without rows."""
        return max(self.share) * len(self.counts)

    @property
    def cv(self) -> float:
        """Coefficient of variation of the counts: standard deviation over mean; 0 is even."""
        scaled = [share * len(self.counts) - 1 for share in self.share]
        return math.sqrt(sum(x * x for x in scaled) / len(scaled)) if self.rows else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the load in nats; ln(E) is even."""
        return sum(-share * math.log(share) for share in self.share if share)

    @property
    def drop_rate(self) -> float:
        """Dropped choices over all choices."""
        return self.dropped / max(self.rows + self.dropped, 1)

    def to_plain(self) -> dict[str, Any]:
        """Every field and figure as JSON has them; `from_plain` reads it back."""
        plain = asdict(self) | {"losses": dict(self.losses)}
        plain |= {name: list(plain[name]) for name in ("counts", "demand", "dead")}
        figures = ("max_over_mean", "cv", "entropy", "drop_rate")
        return plain | {"share": list(self.share)} | {name: getattr(self, name) for name in figures}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "LayerLoad":
        known = {field.name: plain[field.name] for field in fields(cls)}
        return cls(**known | {name: tuple(known[name]) for name in ("counts", "demand", "dead")})


@dataclass(frozen=True)
class LoadSnapshot(Mapping[str, LayerLoad]):
    """Each layer's load by layer name."""

    layers: Mapping[str, LayerLoad]

    def __getitem__(self, name: str) -> LayerLoad:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def change_since(self, earlier: "LoadSnapshot") -> dict[str, float]:
        """How far each layer's load moved: total variation distance, 0 (same shares) to 1 (other experts).

        Layers without rows in one of the two are left out.

        Raises:
            ValueError: the snapshots are of different layers, or a layer's number of experts differs.
        """
        if self.keys() != earlier.keys():
            raise ValueError(f"the snapshots are of different layers: {list(self)} and {list(earlier)}")
        return {name: _distance(self[name], earlier[name]) for name in self if self[name].rows and earlier[name].rows}

    def to_plain(self) -> dict[str, Any]:
        return {name: load.to_plain() for name, load in self.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "LoadSnapshot":
        return cls({name: LayerLoad.from_plain(load) for name, load in plain.items()})


def _distance(load: LayerLoad, earlier: LayerLoad) -> float:
    if len(load.counts) != len(earlier.counts):
        raise ValueError(f"the layer has {len(load.counts)} experts, and had {len(earlier.counts)} before")
    return sum(abs(now - before) for now, before in zip(load.share, earlier.share, strict=True)) / 2
