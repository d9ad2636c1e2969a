"""The blocks of docs/megatron.md run one after another, and its table is that of the code."""

import re
from pathlib import Path

from megatron_processes import run
from moefy_cases import all_arguments

PAGE = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


def test_blocks_run(version):
    (kinds,) = run(version, 1, run_blocks, BLOCKS)
    assert kinds == [[("FastMoELayer", 2)], [("FastMoELayer", 2)], [("MoELayer", 2), ("FastMoEExperts", 2)]]


def run_blocks(blocks):
    """After each block that builds a model, what is in it and trains."""
    from collections import Counter

    import torch

    names, found, seen = {}, [], None
    for block in blocks:
        exec(compile(block, "block", "exec"), names)
        model = names["model"]
        if model is not seen:
            seen = model
            tokens = torch.randint(256, (2, 16))
            positions = torch.arange(16).expand_as(tokens)
            model(tokens, positions, None, labels=tokens).mean().backward()
            kinds = Counter(type(part).__name__ for part in model.modules())
            wanted = ("FastMoELayer", "MoELayer", "FastMoEExperts")
            found.append([(kind, kinds[kind]) for kind in wanted if kinds[kind]])
    return found


def test_the_page_names_what_the_code_reads_and_refuses(version):
    ((_, (read, _, unsupported)),) = run(version, 1, all_arguments)
    for name in (*read, *unsupported):
        assert f"`{name}`" in PAGE, name
