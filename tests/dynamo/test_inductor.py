"""What the backend leaves of the graphs, compiled by Inductor."""

from __future__ import annotations

import shutil

import pytest
import torch

from sparsevila_compile import dynamo
from tests import tiny
from tests.dynamo import models
from tests.tiny import Image, words


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_gives_the_same_tokens_and_recompiles_at_most_three_times() -> None:
    """Recompilations of the forward and of all its components, over twenty lengths."""
    torch._dynamo.reset()
    model = models.compiled("llava", tiny.DENSE, inner="inductor")
    artifact = tiny.compiled("llava", *tiny.DENSE)
    again = torch._dynamo.utils.counters["stats"]
    before = again["unique_graphs"]
    for extra in range(20):
        prompt = tiny.inputs("llava", [[*words(3 + extra), Image(extra), *words(4 + extra, 1)]])
        expected = artifact.generate(**prompt, **tiny.greedy(3))
        assert models.ask(model, prompt, 3) == tiny.answers_of(prompt, expected)
    report = dynamo.report(model)
    assert report.inner == "inductor"
    components = len(artifact.program.components) - 1  # the embedding leaves nothing to compile
    first = 1 + components  # the forward, and each component once
    made = again["unique_graphs"] - before
    assert components < made, "Inductor was not asked"
    assert made - first <= 3
