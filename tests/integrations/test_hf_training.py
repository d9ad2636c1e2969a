"""Training converted models: Trainer, accelerate, checkpointing, PEFT, and the multiplier of balance losses."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dense_models import VOCAB, inputs, llava, make
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fastmoe
from fastmoe.integrations.huggingface.balance import share_of

E, LENGTH = 4, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


DROPOUT = {"opt": {"dropout": 0.0}, "t5": {"dropout_rate": 0.0}}  # those that call it as a function


def moefied(name="llama", weight=1.0):
    """A MoE model in training without dropout, with a balance loss that shows."""
    config = DROPOUT.get(name, {})
    model = fastmoe.moefy(make(name, **config), E, router_options={"aux_loss_weight": weight}).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def texts(count=8, ignored=0):
    """Examples of equal length; of each the first labels, `ignored` many times its number modulo 3, are in no loss."""
    rows = []
    for number in range(count):
        ids = torch.randint(5, VOCAB, (LENGTH,))
        labels = ids.clone()
        labels[: ignored * (number % 3)] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def batches(rows, size=2):
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Grads(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or grads(model)


def train(model, rows, tmp_path, trainer=None, **options):
    seen = Grads()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, learning_rate=0.0, max_grad_norm=0.0,
        report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    made = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[seen], **(trainer or {}))
    made.train()
    return seen.found


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def by_hand(model, rows, main_loss, share):
    """Gradients of `main_loss(output, batch)` over all batches, and of each batch's balance loss times its share."""
    model = copy.deepcopy(model)
    for batch in batches(rows):
        with fastmoe.collect_aux_losses(model) as losses:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        (main_loss(output, batch) + losses.total() * share(batch)).backward()
    return grads(model)


def with_added_losses(model, batch, factor=1.0):
    """A copy's loss, and its gradients where the balance losses were added to that, times a factor."""
    model = copy.deepcopy(model)
    with fastmoe.collect_aux_losses(model) as losses:
        loss = model(**batch).loss
    ((loss + losses.total()) * factor).backward()
    return loss, grads(model)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def token_losses(output, batch):
    return nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("ignored", [0, 2])
def test_balance_losses_under_gradient_accumulation(steps, ignored, tmp_path):
    model, rows = moefied(), texts(2 * steps, ignored)
    total = sum((row["labels"][1:] != -100).sum() for row in rows)
    expected = by_hand(
        model, rows, lambda o, b: token_losses(o, b) / total, lambda b: (b["labels"][:, 1:] != -100).sum() / total
    )
    assert_same(train(model, rows, tmp_path, gradient_accumulation_steps=steps), expected)


def test_accumulation_where_trainer_divides(tmp_path):
    model, rows = moefied(), texts(8)
    model.accepts_loss_kwargs = False
    expected = by_hand(model, rows, lambda o, b: token_losses(o, b) / (2 * (LENGTH - 1)) / 4, lambda b: 1 / 4)
    assert_same(train(model, rows, tmp_path, gradient_accumulation_steps=4), expected)


def own_loss(output, labels, num_items_in_batch):
    return token_losses(output, {"labels": labels}) / num_items_in_batch


def smoothed(output, batch, total):
    log_p = output.logits[:, :-1].log_softmax(-1).flatten(0, 1)
    picked = -log_p.gather(1, batch["labels"][:, 1:].reshape(-1, 1)).sum() * 0.9
    return (picked - 0.1 * log_p.mean(-1).sum()) / total


def test_label_smoothing_keeps_the_balance_loss_and_shifts_the_labels(tmp_path):
    model, rows = moefied(), texts(8)
    total = 8 * (LENGTH - 1)
    expected = by_hand(model, rows, lambda o, b: smoothed(o, b, total), lambda b: 1 / 4)
    found = train(model, rows, tmp_path, gradient_accumulation_steps=4, label_smoothing_factor=0.1)
    assert_same(found, expected)


def test_a_loss_of_ones_own_keeps_the_balance_loss(tmp_path):
    model, rows = moefied(), texts(8)
    expected = by_hand(model, rows, lambda o, b: token_losses(o, b) / (8 * (LENGTH - 1)), lambda b: 1 / 4)
    found = train(model, rows, tmp_path, {"compute_loss_func": own_loss}, gradient_accumulation_steps=4)
    assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, tmp_path):
    model, rows = moefied(), texts(4)
    expected = train(copy.deepcopy(model), rows, tmp_path, gradient_accumulation_steps=2)
    found = train(
        model, rows, tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert_same(found, expected)
    assert any("router" in name for name in found)


@pytest.mark.parametrize("trainer", [{}, {"compute_loss_func": own_loss}])
def test_labels_that_are_kept_from_the_model_and_partly_ignored(trainer, tmp_path):
    """Of each text most labels are in no loss, as of a prompt; the balance loss is of all tokens all the same."""
    model, rows = moefied(), texts(8)
    for row in rows:
        row["labels"][:6] = -100
    options = {} if trainer else {"label_smoothing_factor": 0.1}
    found = train(copy.deepcopy(model), rows, tmp_path, trainer, gradient_accumulation_steps=4, **options)
    without = fastmoe.moefy(make("llama"), E, router_options={"aux_loss_weight": 0.0}).train()
    without.load_state_dict(model.state_dict())
    main = train(without, rows, tmp_path, trainer, gradient_accumulation_steps=4, **options)
    balance = by_hand(model, rows, lambda o, b: 0 * o.logits.sum(), lambda b: 1 / 4)
    assert_same(found, {name: grad + balance[name] for name, grad in main.items()})


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_belongs_to_its_pass(reentrant):
    """Two passes with other padding and multipliers, and one in evaluation, before one backward."""
    model = moefied()
    first, second = (inputs("llama", labels=True) for _ in range(2))
    for batch, real in ((first, 4), (second, 7)):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, real:] = 0
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for one in (reference, model):
        loss = one(**first).loss + 0.1 * one(**second).loss
        with torch.no_grad():
            one.eval()(**second)
        one.train()
        loss.backward()
    assert_same(grads(model), grads(reference))


def test_passes_have_multipliers_of_their_own():
    model, batch = moefied("gpt2"), inputs("gpt2", labels=True)
    reference = copy.deepcopy(model)
    ids = {"input_ids": batch["input_ids"]}
    for one in (model, reference):
        scores = one(**ids).logits.square().mean()
        if one is model:
            scores = scores + 0.0 * one(**batch).loss
        scores.backward()
    assert_same(grads(model), grads(reference))


def test_a_model_inside_is_a_model_by_itself_too():
    model, batch = moefied(), inputs("llama", labels=True)
    reference = copy.deepcopy(model)
    (model(**batch).loss * 1e-3).backward()
    model.zero_grad()
    for one in (model, reference):
        one.model(input_ids=batch["input_ids"]).last_hidden_state.square().mean().backward()
    assert_same(grads(model), grads(reference))


def test_the_multiplier_of_a_model_of_several_models():
    model = fastmoe.moefy(llava(), E, target="*language_model*mlp").train()
    batch = inputs("llama", labels=True)
    _, expected = with_added_losses(model, batch, 0.01)
    (model(**batch).loss * 0.01).backward()
    assert_same(grads(model), expected)


def test_threads_and_models_in_models_have_passes_of_their_own():
    model, batch = moefied(), inputs("llama", labels=True)
    (model(**batch).loss * 3).backward()
    expected = grads(model)
    models = [copy.deepcopy(model) for _ in range(4)]

    def train_one(one):
        one.zero_grad()
        (one(**batch).loss * 3).backward()
        return grads(one)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(train_one, models):
            assert_same(found, expected)
    inner, found = models[0], []
    model.model.register_forward_hook(lambda *_: found.append(train_one(inner)))
    model(**batch)
    assert_same(found[0], expected)


def test_a_second_call_changes_no_multiplier():
    model, batch = fastmoe.moefy(moefied("t5"), E), inputs("t5", labels=True)
    _, expected = with_added_losses(model, batch, 0.01)
    (model(**batch).loss * 0.01).backward()
    assert_same(grads(model), expected)
    fastmoe.set_aux_loss_scale(model, 0.5)
    fastmoe.moefy(model, E)
    assert {layer.aux_loss_scale for layer in fastmoe.moe_layers(model).values()} == {0.5}


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_multiplier_is_that_of_the_main_loss(factor, as_tuple):
    model, batch = moefied("gpt2"), inputs("gpt2", labels=True)
    loss, expected = with_added_losses(model, batch, factor)
    output = model(**batch, return_dict=not as_tuple)
    value = output[0] if as_tuple else output.loss
    torch.testing.assert_close(value, loss)
    (value * factor).backward()
    assert_same({n: g / factor for n, g in grads(model).items()}, {n: g / factor for n, g in expected.items()})


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_padding_is_in_no_balance_loss(name):
    model, batch = moefied(name), inputs(name, labels=True)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 5:] = 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    _, expected = with_added_losses(model, {**batch, "attention_mask": mask})
    other = {**batch, "input_ids": torch.where(mask == 0, 3, batch["input_ids"])}
    model(**other, attention_mask=mask).loss.backward()
    found, expected = ({n: g for n, g in of.items() if "embed" not in n} for of in (grads(model), expected))
    assert_same(found, expected)
    model.eval()
    with torch.no_grad():
        model(**batch, attention_mask=mask)
    assert all(layer.token_mask is None for layer in fastmoe.moe_layers(model).values())


def test_a_multiplier_of_ones_own_stands():
    model, batch = moefied("gpt2"), inputs("gpt2", labels=True)
    fastmoe.set_aux_loss_scale(model, 0.0)
    without = moefied("gpt2", weight=0.0)
    without.load_state_dict(model.state_dict())
    for one in (model, without):
        one(**batch).loss.backward()
    assert_same(grads(model), grads(without))


def test_the_multiplier_is_forgotten_with_the_pass():
    model, batch = moefied("gpt2"), inputs("gpt2", labels=True)
    reference = copy.deepcopy(model)
    (model(**batch).loss * 0.0).backward()
    model.zero_grad()
    ids = {"input_ids": batch["input_ids"]}
    for one in (model, reference):
        one(**ids).logits.square().mean().backward()
    assert_same(grads(model), grads(reference))


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_other_heads(name):
    model, batch = moefied(name), inputs(name, labels=True)
    _, expected = with_added_losses(model, batch, 0.5)
    (model(**batch).loss * 0.5).backward()
    assert_same(grads(model), expected)


def test_what_counts_as_this_pass():
    model = moefied()
    labels = torch.tensor([[5, -100, 6, 7], [8, 9, -100, -100]])
    given = {"labels": labels, "num_items_in_batch": torch.tensor(30)}
    assert share_of(model, given).item() == pytest.approx(3 / 30)
    assert share_of(model, given | {"shift_labels": labels}).item() == pytest.approx(5 / 30)
    assert share_of(moefied("t5"), given).item() == pytest.approx(5 / 30)
    assert share_of(model, {"labels": labels}).item() == 1
    assert share_of(model, {"input_ids": labels, "num_items_in_batch": 30}).item() == 1


def test_the_signature_is_the_dense_ones():
    dense = make("gpt2")
    expected = inspect.signature(dense.forward)
    assert inspect.signature(fastmoe.moefy(dense, E).forward) == expected


def test_trainer_saves_and_resumes(tmp_path):
    rows = texts(8)
    options = {
        "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "disable_tqdm": True, "output_dir": str(tmp_path), "max_steps": 4,
    }  # fmt: skip
    first = InOrder(model=moefied(), args=TrainingArguments(**options), train_dataset=rows)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    again = InOrder(model=loaded, args=TrainingArguments(**options), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == pytest.approx(losses, rel=1e-5)
    for name, parameter in first.model.named_parameters():
        torch.testing.assert_close(dict(again.model.named_parameters())[name], parameter)


def test_accelerate_accumulates():
    from accelerate import Accelerator

    model, rows = moefied(), texts(8)
    expected = by_hand(model, rows, lambda o, b: token_losses(o, b) / (2 * (LENGTH - 1)) / 4, lambda b: 1 / 4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared = accelerator.prepare(model)
    for batch in batches(rows):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
    assert_same(grads(model), expected)


class Broken(torch.nn.Module):
    """A module whose forward compilation cannot trace in one piece."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.inner(x)


@pytest.mark.parametrize(("name", "fullgraph"), [("llama", True), ("llama", False), ("gpt2", False)])
def test_compiled_training(name, fullgraph):
    torch._dynamo.reset()
    model, batch = moefied(name), inputs(name, labels=True)
    if not fullgraph:
        model.lm_head = Broken(model.lm_head)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for factor in (0.5, 0.1):
        for one, called in ((reference, reference), (model, compiled)):
            one.zero_grad()
            (called(**batch).loss * factor).backward()
        assert_same(grads(model), grads(reference))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], []])
def test_lora(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = moefied(), inputs("llama", labels=True)
    parameters = [] if targets else ["mlp.experts.w1", "mlp.experts.w2"]
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM"
    )
    base = copy.deepcopy(model)
    with torch.no_grad():
        before = model.eval()(**batch).logits
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(adapted.eval()(**batch).logits, before)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    first = None
    for _ in range(8):
        loss = adapted.train()(**batch).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert all(p.grad is not None and (p.grad != 0).any() for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
