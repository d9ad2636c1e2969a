"""Expert parallelism inside transformers: logits and gradients on two processes are those of one."""

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from tiny_families import VOCABULARY, build_experts, build_model, families
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig

import fastmoe.integrations.huggingface.expert_parallel as ours
from fastmoe.integrations.huggingface import experts

pytestmark = [
    needs_gloo,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(ours.theirs is None, reason="a transformers without it"),
]

DISTRIBUTED = {
    "fsdp": {"fsdp_size": 2},
    "fsdp recomputed": {"fsdp_size": 2},
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp, their all_reduce": {"tp_size": 2, "tp_plan": "auto", "ep_implementation": "all_reduce"},
    "experts twice": {"fsdp_size": 4},
    "tp and fsdp": {"tp_size": 2, "tp_plan": "auto", "fsdp_size": 2, "ep_size": 4},
    "tp and fsdp, experts twice": {"tp_size": 2, "tp_plan": "auto", "fsdp_size": 2},
    "fsdp, their all_to_all": {"fsdp_size": 2, "ep_implementation": "all_to_all"},
}

# family, layout, experts_implementation, sequences and their length on each process; under tp both have the same
CASES = [
    ("Mixtral", "fsdp", "fastmoe", [(2, 9), (1, 5)]),
    ("Mixtral", "fsdp recomputed", "fastmoe", [(2, 4), (1, 5)]),
    ("Mixtral", "tp", "fastmoe", [(2, 9)]),
    ("Mixtral", "tp", "fastmoe", [(1, 1)]),
    ("Mixtral", "tp", "eager", [(1, 1)]),
    ("Mixtral", "fsdp", "eager", [(1, 1), (2, 5)]),
    ("Qwen3Moe", "fsdp", "grouped_mm", [(1, 4), (2, 5)]),
    ("DeepseekV3", "tp", "fastmoe", [(2, 5)]),
    ("DeepseekV3", "fsdp", "fastmoe", [(2, 5), (1, 2)]),
    ("GptOss", "fsdp", "fastmoe", [(2, 9), (1, 3)]),
    ("Mixtral", "tp, their all_reduce", "fastmoe", [(2, 5)]),
    ("GptOss", "tp, their all_reduce", "fastmoe", [(2, 5)]),
    ("Mixtral", "fsdp, their all_to_all", "fastmoe", [(2, 5), (1, 2)]),
]


def batch(rank, sequences, length):
    ids = torch.arange(sequences * length).reshape(sequences, length) * (rank + 3) % (VOCABULARY - 3) + 3
    torch.manual_seed(rank)
    return ids, torch.randn(sequences, length, VOCABULARY)


def registered():
    experts.register()
    ours.register()


def step(model, ids, upstream):
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * upstream).sum().backward()
    return logits.detach()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model, share=1.0):
    return {n: whole(p.grad) * share for n, p in model.named_parameters() if p.grad is not None}


def on_two(jobs):
    """For each job the logits of this process's batch, every gradient, and tokens generated; and `all_routed()`."""
    return each(jobs), all_routed()


def each(jobs):
    registered()
    return [on_several(*job) for job in jobs]


def on_several(folder, layout, implementation, shapes):
    config = DistributedConfig(**{"ep_size": 2, "ep_implementation": "fastmoe"} | DISTRIBUTED[layout])
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, experts_implementation=implementation
    )
    if "recomputed" in layout:
        model.train()
        model.gradient_checkpointing_enable()
    rank = dist.get_rank() // config.tp_size
    ids, upstream = batch(rank, *shapes[rank])
    logits = whole(step(model, ids, upstream))
    return logits, gradients(model), generate(model, ids) if config.fsdp_size == 1 else None


def generate(model, ids):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None
    )


def on_one(folder, shapes):
    """Each process's logits, gradients of the mean over their batches, and what follows the first batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    batches = [batch(rank, *shape) for rank, shape in enumerate(shapes)]
    logits = [step(model, *given) for given in batches]
    return logits, gradients(model, 1 / len(shapes)), generate(model, batches[0][0])


FOUR = [
    ("Mixtral", "experts twice", "fastmoe", [(2, 3), (1, 5), (1, 2), (2, 2)]),
    ("GptOss", "tp and fsdp", "fastmoe", [(2, 3), (1, 5)]),
    ("Mixtral", "tp and fsdp, experts twice", "fastmoe", [(1, 1), (2, 2)]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {str(family): family for family in families() if str(family) in {case[0] for case in CASES}}
    for name, family in made.items():
        made[name] = tmp_path_factory.mktemp(name)
        build_model(family).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def by_rank(folders):
    return run(2, on_two, [(folders[name], *rest) for name, *rest in CASES])


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: " ".join(map(str, CASES[i])))
def test_two_processes_compute_what_one_does(number, folders, by_rank):
    assert_as_one(CASES[number], folders, [of_models[number] for of_models, _ in by_rank])


@pytest.mark.slow
def test_four_processes_compute_what_one_does(folders):
    for case, found in zip(
        FOUR, zip(*run(4, each, [(folders[n], *rest) for n, *rest in FOUR]), strict=True), strict=True
    ):
        assert_as_one(case, folders, found)


def assert_as_one(case, folders, by_rank):
    name, _, _, shapes = case
    logits, grads, tokens = on_one(folders[name], shapes)
    for rank, (got_logits, got, got_tokens) in enumerate(by_rank):
        assert got_tokens is None or torch.equal(got_tokens, tokens)
        torch.testing.assert_close(got_logits, logits[rank * len(shapes) // len(by_rank)], rtol=1e-5, atol=1e-5)
        assert got.keys() == grads.keys()
        for parameter, value in grads.items():
            atol = float(2e-5 * value.abs().max())
            torch.testing.assert_close(got[parameter], value, rtol=0, atol=atol, msg=parameter)


# Tokens of each process, or of both if there is one number; to which of four experts they go; who computes these.
ROUTED = [
    ((5, 7), "all"),
    ((6, 0), "all"),
    ((0, 0), "all"),
    ((5, 3), "first"),
    ((0, 4), "last"),
    ((7,), "all"),
    ((1,), "all"),
    ((0,), "all"),
    ((6,), "last"),
]
ROUTED = [(*tokens, by) for tokens in ROUTED for by in ("fastmoe", "eager")]


def routed(tokens, where):
    """`(x, ids, weights, upstream)` of each batch."""
    torch.manual_seed(0)
    allowed = {"all": [0, 1, 2, 3], "first": [0, 1], "last": [3, 2]}[where]
    return [
        (
            torch.randn(T, 32, dtype=torch.float64, requires_grad=True),
            torch.tensor(allowed)[torch.rand(T, len(allowed)).argsort(1)[:, :2]],
            torch.rand(T, 2, dtype=torch.float64, requires_grad=True),
            torch.randn(T, 32, dtype=torch.float64),
        )
        for T in tokens
    ]


def mixtral_experts(implementation):
    torch.manual_seed(1)
    module = build_experts(next(f for f in families() if str(f) == "Mixtral")).double()
    module.config._experts_implementation = implementation
    return module


def all_routed():
    """For each of `ROUTED` the output and the gradients of this process."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("spread", "alone"))
    spread, alone = mesh["spread"], mesh["alone"]
    found = []
    for tokens, where, implementation in ROUTED:
        module = mixtral_experts(implementation)
        held = slice(2 * rank, 2 * rank + 2)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(parameter.detach()[held].clone()))
        module.num_experts = 2
        x, ids, weights, upstream = routed(tokens, where)[rank if len(tokens) > 1 else 0]
        y = ours.ExpertParallelism(module, spread, alone if len(tokens) > 1 else spread)(x, ids, weights)
        y.backward(upstream)
        found.append([y.detach(), x.grad, weights.grad, *(p.grad for p in module.parameters())])
    return found


@pytest.mark.parametrize("number", range(len(ROUTED)), ids=lambda i: " ".join(map(str, ROUTED[i])))
def test_any_tokens_to_any_experts(number, by_rank):
    tokens, where, _ = ROUTED[number]
    batches, module = routed(tokens, where), mixtral_experts("eager")
    expected = []
    for x, ids, weights, upstream in batches:
        y = module(x, ids, weights)
        (y * upstream + 0 * (x.sum() + weights.sum())).sum().backward()  # eager's may depend on nothing
        expected.append([y.detach(), x.grad, weights.grad])
    for rank, got in enumerate(routed_ones[number] for _, routed_ones in by_rank):
        held = slice(2 * rank, 2 * rank + 2)
        of_experts = [(torch.zeros_like(p) if p.grad is None else p.grad)[held] for p in module.parameters()]
        torch.testing.assert_close(got, expected[rank if len(tokens) > 1 else 0] + of_experts)
