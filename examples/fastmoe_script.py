"""A script as it was written for FastMoE: a Transformer with experts on all workers learns to spell.

python examples/fastmoe_script.py
torchrun --nproc-per-node 2 examples/fastmoe_script.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fmoe import DistributedGroupedDataParallel, FMoE, FMoETransformerMLP
from fmoe.gates import BaseGate, GShardGate

LETTERS, LENGTH, BATCH = 27, 32, 16
D_MODEL, D_HIDDEN, NUM_EXPERT = 48, 96, 4


class SigmoidGate(BaseGate):
    """A gate of one's own: experts are scored one by one, and a loss keeps the scores low."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__(num_expert, world_size)
        self.linear = nn.Linear(d_model, self.tot_expert)
        self.top_k = top_k

    def forward(self, inp):
        scores = self.linear(inp).sigmoid()
        gate_top_k_val, gate_top_k_idx = torch.topk(scores, k=self.top_k, dim=-1)
        self.set_loss(scores.square().mean())
        return gate_top_k_idx, gate_top_k_val


class GatedExpert(nn.Module):
    """An expert of one's own."""

    def __init__(self, d_model):
        super().__init__()
        self.up, self.gate = nn.Linear(d_model, D_HIDDEN), nn.Linear(d_model, D_HIDDEN)
        self.down = nn.Linear(D_HIDDEN, d_model)

    def forward(self, inp, fwd_expert_count):
        return self.down(self.up(inp) * F.silu(self.gate(inp)))


class GatedMLP(FMoE):
    """A layer of such experts with such a gate."""

    def __init__(self, world_size):
        super().__init__(NUM_EXPERT, D_MODEL, world_size, gate=SigmoidGate, expert=GatedExpert)
        self.mark_parallel_comm()

    def forward(self, inp):
        return super().forward(inp.reshape(-1, D_MODEL)).reshape(inp.shape)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.attention = nn.MultiheadAttention(D_MODEL, num_heads=4, batch_first=True)
        self.mlp = mlp

    def forward(self, x, mask):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, world_size):
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, D_MODEL), nn.Embedding(LENGTH, D_MODEL)
        mlp = FMoETransformerMLP(NUM_EXPERT, D_MODEL, D_HIDDEN, nn.GELU(), world_size=world_size, gate=GShardGate)
        self.blocks = nn.ModuleList([Block(mlp), Block(GatedMLP(world_size))])
        self.out = nn.Sequential(nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, LETTERS))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.letters(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return self.out(h)


def text(worker, num_words=20_000):
    """Words in any order, one letter after another; all workers use the same words."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + worker)
    words = [torch.randint(1, LETTERS, (4 + i % 5,), generator=shared) for i in range(24)]
    order = torch.randint(len(words), (num_words,), generator=own).tolist()
    return torch.cat([F.pad(words[i], (0, 1)) for i in order])


def train(steps, device):
    """The loss of every step, the mean over the workers, and the model."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(rank)
    model = DistributedGroupedDataParallel(Transformer(world_size).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data, losses = text(rank).to(device), []
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), device=device)
        pieces = data[starts + torch.arange(LENGTH + 1, device=device)]
        logits = model(pieces[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        balance = sum(layer.gate.get_loss() for layer in model.modules() if isinstance(layer, FMoE))
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        model.allreduce_params()
        optimizer.step()
        mean = loss.detach() / world_size
        if world_size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.2f}")
    return losses, model


def main():
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu", int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else 0)
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if on_gpu else "gloo")
    losses, _ = train(161, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if losses[-1] > 0.5 * losses[0]:
        raise SystemExit(f"the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} only")


if __name__ == "__main__":
    main()
