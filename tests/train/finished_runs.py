"""Made-up finished runs for the tests of `fastmoe compare`, each a folder with a results.json."""

import json


def change(written, path, value):
    """Put `value` where the dotted `path` leads; `...` takes away what is there."""
    *sections, last = path.split(".")
    for section in sections:
        written = written[section]
    if value is ...:
        del written[last]
    else:
        written[last] = value


def write_run(folder, losses, kind="dense", step_seconds=1.0, flops=2.0, seed=1, both=None, changes=None):
    """Evaluated every 10 steps; a step is of 8 tokens. `both` are the MoE's losses of a run of two models."""
    steps = [10 * i for i in range(len(losses))]
    history = {
        "valid_steps": steps,
        "valid_seconds": [step_seconds * step for step in steps],
        "valid_losses": losses,
    }
    kinds = [kind] if both is None else ["dense", "moe"]
    written = {
        "machine": {"cpu": "some CPU"},
        "corpus": {"name": "text", "sha256": "same"},
        "config": {
            "optim": {"batch_size": 4, "lr": 0.1},
            "model": {"arch": "gpt", "block_size": 2, "n_layer": 2},
            "moe": {"top_k": 2},
            "data": {"path": "text", "eval_sequences": 16},
            "run": {"seed": seed},
        },
        "results": {each: {"train_flops_per_token": flops} for each in kinds},
        "histories": {kind: history} if both is None else {"dense": history, "moe": history | {"valid_losses": both}},
    }
    for path, value in (changes or {}).items():
        change(written, path, value)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(written))
    return str(folder)
