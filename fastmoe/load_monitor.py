"""`LoadMonitor`: watches the load of a model's MoE layers."""

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmoe._errors import check_int
from fastmoe._processes import Processes
from fastmoe.layer import MoE
from fastmoe.model import moe_layers
from fastmoe.monitor.counters import SUMS, LayerCounters
from fastmoe.monitor.snapshot import LayerLoad, LoadSnapshot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoadMonitor:
    """Sums up every training pass of every MoE layer of a model, on its device, until `snapshot()` is called.

    ```
    with fastmoe.LoadMonitor(model) as monitor:
        for step, batch in enumerate(batches):
            train_step(batch)
            if step % 100 == 0:
                snapshot = monitor.snapshot()  # {layer name: fastmoe.LayerLoad}
    ```

    Args:
        model: has an MoE layer at least.
        group: the processes that share the batch; None for all that `torch.distributed` knows.
        dead_after: an expert is dead after so many passes without a row.

    Raises:
        ValueError: no MoE layer, or `dead_after` below 1.
    """

    def __init__(self, model: nn.Module, *, group: "ProcessGroup | None" = None, dead_after: int = 100) -> None:
        self.layers = moe_layers(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no fastmoe.MoE layer to monitor")
        self.group, self.dead_after = group, check_int("dead_after", dead_after, 1)
        self.counters = {name: LayerCounters(layer, _device(layer)) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.observers.append(self.counters[name])

    def snapshot(self) -> LoadSnapshot:
        """The load since the last snapshot, over all processes; a new window starts.

        Every process of the group calls it, equally often. It waits for the device.
        """
        processes = Processes.of(self.group)
        counters = list(self.counters.values())
        names = self._loss_names(processes)
        flats = [one.flat(names) for one in counters]
        ages = [one.ages() for one in counters]
        device = flats[0].device
        sums = processes.sum(torch.cat([flat.to(device) for flat in flats])).cpu()
        aged = processes.gather(torch.cat([age.to(device) for age in ages])).cpu()
        for one in counters:
            one.start_window()
        sums_by_layer, ages_by_layer = sums.split([len(x) for x in flats]), aged.split([len(x) for x in ages], 1)
        by_layer = zip(self.counters, sums_by_layer, ages_by_layer, strict=True)
        return LoadSnapshot({name: self._load(flat, ages_P, names) for name, flat, ages_P in by_layer})

    def _loss_names(self, processes: Processes) -> list[str]:
        """The names of all losses on any process: one that has not run yet knows none."""
        own = sorted({name for one in self.counters.values() for name in one.losses})
        if processes.group is None:
            return own
        line = (json.dumps(own) + "\n").encode()
        device = next(iter(self.counters.values())).counts_E.device
        everyone, _ = processes.gather_rows(torch.tensor(list(line), dtype=torch.uint8, device=device))
        return sorted({name for names in bytes(everyone.tolist()).splitlines() for name in json.loads(names)})

    def _load(self, flat: Tensor, ages_P: Tensor, loss_names: list[str]) -> LayerLoad:
        """From what all processes summed, and each process's ages `(P, 1 + E)`."""
        num_experts = ages_P.shape[1] - 1
        counts_E, demand_E, scalars = flat.split([num_experts, num_experts, len(SUMS) + len(loss_names)])
        summed, losses = scalars.split([len(SUMS), len(loss_names)])
        total = dict(zip(SUMS, summed.tolist(), strict=True))
        return LayerLoad(
            counts=tuple(counts_E.long().tolist()),
            demand=tuple(demand_E.long().tolist()),
            passes=int(total["passes"]),
            tokens=int(total["tokens"]),
            unrouted_tokens=int(total["unrouted"]),
            dropped=int(total["dropped"]),
            dead=tuple((_idle(ages_P) >= self.dead_after).nonzero().flatten().tolist()),
            mean_weight=total["weight"] / total["rows"] if total["rows"] else None,
            router_entropy=total["entropy"] / total["scored_tokens"] if total["scored_tokens"] else None,
            losses=dict(zip(loss_names, (losses / max(total["passes"], 1)).tolist(), strict=True)),
        )

    def close(self) -> None:
        """Stop watching; the layers are as before."""
        for name, layer in self.layers.items():
            if self.counters[name] in layer.observers:
                layer.observers.remove(self.counters[name])

    def __enter__(self) -> "LoadMonitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _device(layer: MoE) -> torch.device:
    return next((tensor.device for tensor in layer.parameters()), torch.device("cpu"))


def _idle(ages_P: Tensor) -> Tensor:
    """Passes since each expert last had a row on any process; where it never had one, all passes there were."""
    passes_P1, last_PE = ages_P[:, :1], ages_P[:, 1:]
    return torch.where(last_PE > 0, passes_P1 - last_PE, passes_P1.max()).amin(0)
