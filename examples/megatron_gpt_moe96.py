"""A GPT of Megatron-Core with 96 experts in every layer, beside the same GPT with Megatron's own MoE layer.

    python examples/megatron_gpt_moe96.py                                      # a toy, on one process
    torchrun --nproc-per-node 2 examples/megatron_gpt_moe96.py                 # experts on two processes
    torchrun --nproc-per-node 8 examples/megatron_gpt_moe96.py --size real     # on GPUs

Both start from the same weights, so their losses are the same; the time of a step is compared. It needs the extra
`fastmoe[megatron]`, and without CUDA a checkout of the repository, whose tests know what Megatron-Core asks of CUDA.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
if not CUDA:
    sys.path.insert(0, str(ROOT / "tests" / "megatron_core"))
    import megatron_cpu

    megatron_cpu.install()  # Megatron-Core calls torch.cuda without asking

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from fastmoe.integrations.megatron import gpt_layer_spec, same_values

EXPERTS, TOP_K = 96, 2
SIZES = {
    "toy": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4},
    "real": {"num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16},
}
LENGTHS = {"toy": 64, "real": 1024}


def main() -> None:
    options = arguments()
    start_processes()
    models = {name: build(options, name) for name in ("megatron", "fastmoe")}
    same_values(models["megatron"].module, models["fastmoe"].module)
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in options.text)), dtype=torch.uint8)
    losses, times = ({name: [] for name in models} for _ in range(2))
    for step in range(options.steps):
        for name, model in models.items():
            loss, seconds = train_step(model, optimizers[name], batches(text, step, options), options)
            losses[name].append(loss)
            times[name].append(seconds)
        if dist.get_rank() == 0:
            print(f"step {step}: loss " + ", ".join(f"{name} {losses[name][-1]:.4f}" for name in models), flush=True)
    if dist.get_rank() == 0:
        of = {name: statistics.median(times[name][1:]) for name in models}
        print(f"median step: megatron {of['megatron']:.3f} s, fastmoe {of['fastmoe']:.3f} s, "
              f"{of['megatron'] / of['fastmoe']:.2f} times as fast")  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="sequences in each process")
    parser.add_argument("--text", type=Path, nargs="+", default=sorted((ROOT / "docs").glob("*.md")))
    return parser.parse_args()


def start_processes() -> None:
    """Every process holds its share of the experts, and a batch of its own."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29455"}.items():
        os.environ.setdefault(name, value)
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if CUDA else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build(options: argparse.Namespace, name: str) -> DistributedDataParallel:
    torch.manual_seed(1)
    config = TransformerConfig(
        **SIZES[options.size],
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=HAVE_TE,
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=CUDA,
        params_dtype=torch.bfloat16 if CUDA else torch.float32,
        use_cpu_initialization=not CUDA,
        finalize_model_grads_func=finalize_model_grads,
    )
    if HAVE_TE:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=True)
    else:
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS)
    if name == "fastmoe":
        spec = gpt_layer_spec(EXPERTS, layer_spec=spec)  # the one line
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=LENGTHS[options.size])
    if CUDA:
        model = Float16Module(config, model.cuda())
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def optimizer_of(model: DistributedDataParallel):
    dtype = model.config.params_dtype
    config = OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.0, bf16=CUDA, params_dtype=dtype)
    return get_megatron_optimizer(config, [model])


def batches(text: torch.Tensor, step: int, options: argparse.Namespace):
    """This process's bytes of text for a step."""
    length = LENGTHS[options.size]
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    starts = torch.randint(len(text) - length - 1, (options.batch,), generator=draw).tolist()
    drawn_BS = torch.stack([text[start : start + length + 1].long() for start in starts])
    return iter([drawn_BS.to("cuda" if CUDA else "cpu")])


def train_step(model, optimizer, data, options: argparse.Namespace) -> tuple[float, float]:
    """The mean loss of all processes, and the seconds that the step took."""
    begin = time.perf_counter()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reported = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=[model],
        num_microbatches=1,
        seq_length=LENGTHS[options.size],
        micro_batch_size=options.batch,
        forward_only=False,
    )
    optimizer.step()
    loss = reported[0]["loss"].clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size(), time.perf_counter() - begin


def forward_step(data, model):
    bytes_BS = next(data)
    tokens, labels = bytes_BS[:, :-1].contiguous(), bytes_BS[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def mean(losses_BS):
        loss = losses_BS.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return model(tokens, positions, None, labels=labels), mean


if __name__ == "__main__":
    main()
