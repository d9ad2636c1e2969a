"""Fixtures of the tests with transformers."""

import pytest
from tiny_families import counting
from transformers.integrations.moe import ExpertsInterface

from fastmoe.integrations.huggingface import experts as ours


@pytest.fixture
def calls():
    """The experts modules that ours was called for, one for each call."""
    seen = []
    ExpertsInterface.register("fastmoe", counting(seen))
    yield seen
    ours.register()
