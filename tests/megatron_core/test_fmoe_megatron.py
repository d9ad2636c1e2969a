"""`fmoe.megatron`: FastMoE's lines for Megatron, over Megatron-Core."""

import re
from pathlib import Path

import fmoe_megatron_cases as cases
import fmoe_megatron_checkpoints as checkpoints
import pytest
import torch
from megatron_processes import run
from megatron_values import whole

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating-megatron.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("gate", cases.GATES)
def test_numbers_are_the_same_on_two_workers(version, gate):
    """A batch on one process and on two workers, which are one batch to a gate; and losses fall."""
    (one,), two = (run(version, world, cases.losses_and_norms, gate, ep=world) for world in (1, 2))
    for found in two:
        torch.testing.assert_close(found[0], one[0], rtol=2e-5, atol=2e-6)
    losses = [loss for loss, _ in one[0]]
    assert losses == sorted(losses, reverse=True)
    values, expected = whole([found[1] for found in two]), whole([one[1]])
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-4)


def test_two_pairs_of_workers(version):
    """Each pair has all experts, and is one batch to its gates."""
    answers = run(version, 4, cases.losses_and_norms, "own", steps=1, ep=2)
    assert all(losses == answers[0][0] for losses, _ in answers)
    whole(values for _, values in answers)


def test_balance_losses_are_added_by_their_weight(version):
    none, once, twice = (run(version, 1, cases.gate_gradients, weight)[0] for weight in (0.0, 1.0, 2.0))
    for without, first, second in zip(none, once, twice, strict=True):
        assert (first - without).abs().max() > 1e-4
        torch.testing.assert_close(second - without, 2 * (first - without), rtol=1e-4, atol=1e-6)


def test_layers_and_gates(version):
    (found,) = run(version, 1, cases.layers_of)
    assert found == [("NaiveGate", 4, 2, 24, number, 0.5) for number in (1, 2)]
    (found,) = run(version, 1, cases.layers_of, top_k=1, hidden_hidden_size=None, balance_strategy="switch")
    assert [one[:4] for one in found] == [("SwitchGate", 4, 1, 48)] * 2
    (found,) = run(version, 1, cases.layers_of, gate="ZeroGate", hidden_hidden_size=None, distributed_experts=None)
    assert [one[:4] for one in found] == [("ZeroGate", 4, 2, 24)] * 2


def test_a_layer_of_a_spec(version):
    assert run(version, 1, cases.in_a_spec) == [[(4, 1, True), (4, 2, True)]]


def test_what_cannot_be_is_said_and_nothing_changes(version):
    (found,) = run(version, 1, cases.errors)
    expected = {
        "version": "megatron_version='v2.5' is of Megatron-LM",
        "strategy": "unknown balance_strategy 'gshared'. Did you mean 'gshard'?",
        "gate": "unknown gate 'NiaveGate'. Did you mean 'NaiveGate'?",
        "both": "give one of them",
        "switch": "topk must be 1, got 2",
        "none": "give fmoe_num_experts=",
        "zero": "fmoe_num_experts must be a whole number >= 1, got 0",
        "hidden": "ffn_hidden_size=48 is not a multiple of top_k=5",
        "weight": "balance_loss_weight must be a finite number >= 0, got -1.0",
        "wrapped": "before it is wrapped; got DistributedDataParallel",
        "again": "found no MLP of Megatron-Core in GPTModel",
        "gone": "fmoe.megatron has no patch_forward_step any more. balance losses are attached",
    }
    assert found.keys() == expected.keys()
    for case, words in expected.items():
        message, unchanged = found[case]
        assert words in message, case
        assert unchanged, case
    assert "must return top_k_idx of (64, 2), got (3,)" in run(version, 1, cases.wrong_answer)[0]


def test_what_two_workers_cannot_be(version):
    for copies, number in run(version, 2, cases.errors_of_workers, ep=2):
        assert "needs expert_model_parallel_size=1, got 2" in copies
        assert "num_experts=6, but the configuration says num_moe_experts=4" in number


def test_balance(version):
    """Of each worker's own choices, and written as their mean."""
    from fmoe.balance import metrics

    answers = run(version, 2, cases.balance, ep=2)
    for before, after, loads, losses, _ in answers:
        assert set(before) == {*metrics, "balance_loss"}
        assert all(value == [None, None] for value in before.values())
        assert all(0 < sum(load) <= 64 for load in loads)
        for name, metric in metrics.items():
            assert [float(value) for value in after[name]] == [
                float(metric(torch.tensor(one).float())) for one in loads
            ]
        assert [float(value) for value in after["balance_loss"]] == losses
    assert answers[1][4] is None
    written = answers[0][4]
    assert len(written) == 3 * len(answers[0][1])
    for name in answers[0][1]:
        each = [sum(float(answer[1][name][layer]) for answer in answers) / 2 for layer in (0, 1)]
        for key, value in zip(("layer-0", "layer-1", "all"), (*each, sum(each) / 2), strict=True):
            got, iteration = written[f"balance-{name}/{key}"]
            assert iteration == 7
            assert abs(got - value) < 1e-6 * abs(value)


def test_gradients_are_reduced_by_hand_as_by_a_schedule(version):
    by_schedule, by_hand = zip(*run(version, 2, cases.reduced_by_hand, ep=2), strict=True)
    by_hand, by_schedule = whole(by_hand), whole(by_schedule)
    assert by_hand.keys() == by_schedule.keys()
    for name, value in by_schedule.items():
        torch.testing.assert_close(by_hand[name], value, rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "adam": {},
    "momentum": {"optimizer": "sgd", "sgd_momentum": 0.9},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_bit_equal_from_a_checkpoint(version, tmp_path, optimizer):
    """Saved after 2 of 4 steps on two workers; loaded and saved anew on one; 2 more steps on two workers."""
    case = {"optimizer": OPTIMIZERS[optimizer]}
    through = run(version, 2, checkpoints.continued, tmp_path, 4, save_after=2, ep=2, **case)
    run(version, 1, checkpoints.continued, tmp_path, 0, load=True, save_after=0, **case)
    then = run(version, 2, checkpoints.continued, tmp_path, 2, load=True, ep=2, **case)
    for found, expected in zip(then, through, strict=True):
        assert found[:3] == (4, expected[1][2:], expected[2])
    values, expected = (whole([one[3] for one in answers]) for answers in (then, through))
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], value) for name, value in expected.items())


def test_groups_of_parameters_keep_their_learning_rates(version, tmp_path):
    for rates in run(version, 2, checkpoints.rates_after_loading, tmp_path, ep=2):
        assert sorted(rates) == [(False, 0.25), (False, 0.25), (True, 0.5)]


def test_random_numbers_go_on(version, tmp_path):
    """Whose noise a gate adds, on as many processes as before."""
    (through,) = run(version, 1, checkpoints.continued, tmp_path, 3, save_after=1, random=True)
    (then,) = run(version, 1, checkpoints.continued, tmp_path, 2, load=True, random=True)
    assert then[1] == through[1][1:]


def test_a_killed_process_leaves_the_last_checkpoint(version, tmp_path):
    run(version, 1, checkpoints.continued, tmp_path, 1, save_after=1)
    with pytest.raises(AssertionError, match="exit code 3"):
        run(version, 1, checkpoints.killed_while_saving, tmp_path)
    assert (tmp_path / "iter_0000002.partial").is_dir()
    (found,) = run(version, 1, checkpoints.continued, tmp_path, 1, load=True, save_after=1)
    assert found[0] == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"}
    assert run(version, 1, checkpoints.continued, tmp_path, 0, load=True)[0][0] == 2


def test_checkpoints_that_do_not_fit(version, tmp_path):
    (found,) = run(version, 1, checkpoints.checkpoint_errors, tmp_path)
    assert (found["empty"], found["list"]) == (0, 1)
    assert "is not a checkpoint of this model: " in found["other"]
    assert "has no optimizer: give None for it" in found["optimizer"]
    assert "iteration must be a whole number >= 1, got 0" in found["zero"]
    assert "without virtual pipeline stages, got 2" in found["pieces"]
    assert "Apex's Adam alone, and this is PyTorch's AdamW" in found["distributed"]
    assert "must hold the number of an iteration, got 'release'" in found["odd"]


def test_blocks_of_the_guide_run(version, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == 3
    assert run(version, 1, cases.run_blocks, blocks, tmp_path) == [1]


def test_what_is_gone_is_in_the_guide():
    gone = re.findall(r"^    \"(\w+)\": \"", (ROOT / "fmoe" / "megatron" / "__init__.py").read_text(), re.M)
    assert len(gone) == 5
    assert all(f"`{name}`" in PAGE for name in gone)
