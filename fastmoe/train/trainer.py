"""`Trainer`: one model in training, with all that belongs to it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmoe
from fastmoe._seeds import mix
from fastmoe.models.common import language_model_step
from fastmoe.train import checkpoint
from fastmoe.train.batches import Share
from fastmoe.train.build import autocast_dtype, build_batches, build_model, build_optimizer, learning_rate, spread
from fastmoe.train.config import Kind, TrainConfig
from fastmoe.train.corpus import Corpus
from fastmoe.train.history import BITS, History
from fastmoe.train.memory import Memories, Memory
from fastmoe.train.options import to_plain
from fastmoe.train.world import World


class Trainer:
    """Takes steps, evaluates, saves and restores. What is random in a step depends on (seed, step, rank) alone."""

    def __init__(self, config: TrainConfig, kind: Kind, corpus: Corpus, world: World) -> None:
        self.config, self.kind, self.corpus, self.world = config, kind, corpus, world
        self.folder = config.run.out / kind
        self.model = build_model(config, kind).to(world.device)
        if world.mesh is not None:
            spread(self.model, world.mesh, config.parallel)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.step = 0
        self.saved: int | None = None
        self.batches = build_batches(config)
        self.memory = Memories(config.optim.grad_accumulation, world.rank, world.size)
        self._check_data()
        self.history = History()
        self.grad_norm = torch.zeros(())
        self.pending_losses: list[Tensor] = []

    def _check_data(self) -> None:
        """Draw once what training draws later, so that data too short or a batch that does not divide fails at once."""
        self._draw_batch(0)
        for part in (self.corpus.valid, self.corpus.test):
            if part.numel():
                next(iter(self.batches.held_out(part, self._share())))

    def take_step(self) -> None:
        started = time.perf_counter()
        run, optim = self.config.run, self.config.optim
        torch.manual_seed(mix(run.seed, self.step, self.world.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, optim)
        losses = [self._micro_step(i) for i in range(optim.grad_accumulation)]
        self.grad_norm = fastmoe.clip_grad_norm_(self.model, optim.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending_losses.append(torch.stack(losses).mean())
        self.step += 1
        self.history.seconds += time.perf_counter() - started

    def _micro_step(self, index: int) -> Tensor:
        micro_steps = self.config.optim.grad_accumulation
        tokens_BS, targets_BS = self._draw_batch(index)
        with self._no_sync(is_last=index == micro_steps - 1):
            with self._autocast():
                loss, self.memory.values[index] = self._loss(tokens_BS, targets_BS, self.memory.values[index])
            (loss / micro_steps).backward()
        return loss.detach()

    def _loss(self, tokens_BS: Tensor, targets_BS: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        device = self.world.device
        return language_model_step(self.model, tokens_BS.to(device), targets_BS.to(device), memory)

    def _draw_batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        share = self._share(micro_step, self.config.optim.grad_accumulation)
        return self.batches.draw(self.corpus.train, self.step, share)

    def _share(self, micro_step: int = 0, micro_steps: int = 1) -> Share:
        return Share(micro_step, micro_steps, self.world.rank, self.world.size)

    def _no_sync(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last or self.world.mesh is None else fastmoe.no_sync(self.model)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.world.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def flush(self) -> None:
        """Bring the losses of past steps to the CPU, into the history.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        if not self.pending_losses:
            return
        started = time.perf_counter()
        losses = (self.world.sum(torch.stack(self.pending_losses)) / self.world.size * BITS).tolist()
        self.pending_losses.clear()
        self.history.seconds += time.perf_counter() - started
        for loss in losses:
            if not math.isfinite(loss):
                step = len(self.history.losses) + 1
                raise FloatingPointError(f"{self.kind}: the loss is {loss} at step {step}; try a smaller lr")
            self.history.losses.append(loss)

    def evaluate(self) -> None:
        """Add a point to the history: held-out loss, and the expert load of the last training step."""
        self.flush()
        load = self.expert_load()
        self.history.add_evaluation(self.step, self.loss_on(self.corpus.valid), load)

    @torch.no_grad()
    def loss_on(self, data: Tensor) -> float:
        """Bits per byte on the fixed held-out text of `data`, which the processes share out; memory starts empty.

        All processes call the model equally often.
        """
        total = torch.zeros(2, dtype=torch.float64)
        memory: Memory = None
        self.model.eval()
        for batch in self.batches.held_out(data, self._share()):
            with self._autocast():
                loss, memory = self._loss(batch.tokens_BS, batch.targets_BS, None if batch.fresh else memory)
            counted = batch.counted * batch.tokens_BS.shape[1]
            total += torch.tensor([loss.item() * counted, counted])
        self.model.train()
        nats, tokens = self.world.sum(total.to(self.world.device)).tolist()
        return nats / tokens * BITS

    def expert_load(self) -> list[list[float]]:
        """Share of the last forward pass's rows that each expert got, over all processes, by layer."""
        loads = []
        for layer in fastmoe.moe_layers(self.model).values():
            if layer.last_stats is None:
                continue
            counts_E = self.world.sum(layer.last_stats.counts.to(self.world.device, torch.float32))
            loads.append((counts_E / counts_E.sum().clamp(min=1)).tolist())
        return loads

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet; all processes call it."""
        if self.saved == self.step:
            return
        self.flush()
        path = checkpoint.path_of(self.folder, self.step)
        together = self.world.together
        together.first(lambda: checkpoint.delete(path))
        together.each(lambda: self.memory.save(path))
        fastmoe.save(self.model, self.optimizer, path, extra=self._extra())
        self.saved = self.step
        if self.world.is_main:
            checkpoint.take_memory(path)
            checkpoint.prune(self.folder, self.config.run.keep_checkpoints, newest=path)

    def _extra(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "step": self.step,
            "history": self.history.to_plain(),
            "config": to_plain(self.config),
            "corpus": self.corpus.sha256,
            "memory_parts": self.memory.parts_to_save(),
        }

    def restore(self, path: Path) -> Path:
        """Go on from a checkpoint, with this run's optimizer options; all processes call it.

        Raises:
            OtherRunError: the checkpoint is of another model, MoE, batch size, seed or corpus.
            ValueError, OSError, RuntimeError: it cannot be read.
        """
        extra = self.world.together.each(lambda: checkpoint.read_extra(path))
        self._check_same_run(path, extra)
        groups = self.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        fastmoe.load(self.model, self.optimizer, path)
        for group, own in zip(groups, options, strict=True):
            group.update(own)
        self.history = History(**extra["history"])
        self.step = self.saved = extra["step"]
        parts = extra.get("memory_parts", 0)
        self.world.together.each(lambda: self.memory.restore(path, parts, self.world.device))
        return path

    def _check_same_run(self, path: Path, extra: dict[str, Any]) -> None:
        plain, defaults = to_plain(self.config), to_plain(TrainConfig())
        for section in ("model", "moe"):
            then = defaults[section] | extra["config"][section]  # it may be older than some option
            if then != plain[section]:
                raise checkpoint.OtherRunError(f"{path} was trained with {section} = {then}; now {plain[section]}")
        for section, name in (("optim", "batch_size"), ("run", "seed")):
            then, now = extra["config"][section][name], plain[section][name]
            if then != now:
                raise checkpoint.OtherRunError(f"{path} was trained with {name} = {then}; got {name} = {now}")
        if extra["corpus"] != self.corpus.sha256:
            raise checkpoint.OtherRunError(f"{path} was trained on other data than {self.corpus.name}")
