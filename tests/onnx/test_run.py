"""ONNX Runtime behind the engine: the same tokens as torch on the same program, in every use."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from sparsevila_compile.model import CompiledModel, load
from tests import tiny, tiny_checkpoint
from tests.onnx.made import SPARSE, in_torch, lowered, save
from tests.tiny import Image, Video, words

FUSED: tuple[tiny.Spec, ...] = (
    *SPARSE,
    "merge_linears",
    "fuse_rms_norm",
    "fuse_rotary",
    "fuse_silu_mul",
    "trim_last_layer",
)
NEW = 24


@cache
def _folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp())


@cache
def pair(name: str, passes: tuple[str, ...] = ("sparse",)) -> tuple[CompiledModel, CompiledModel]:
    """The same program in torch and as a bundle."""
    specs = {"sparse": SPARSE, "dense": tiny.DENSE, "fused": FUSED}[passes[0]]
    pure = "pure" in passes
    program = lowered(name, *specs, pure=pure)
    path = save(program, _folder() / "-".join((name, *passes)), pure)
    return in_torch(program), load(path)


def same(one: CompiledModel, other: CompiledModel, rows: list[tiny.Row], name: str) -> torch.Tensor:
    prompt = tiny.inputs(name, rows)
    expected = one.generate(**prompt, **tiny.greedy(NEW))
    assert torch.equal(other.generate(**prompt, **tiny.greedy(NEW)), expected)
    assert other.usage == one.usage
    new = expected[:, prompt["input_ids"].shape[1] :]
    assert new.unique().numel() > 4, "answers that vary"
    return new


ROWS: list[tiny.Row] = [[Image(1, (4, 8)), *words(5)], words(3), [Image(2), 44, Image(3), 45]]


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "llava_tied", "qwen_windowed"])
def test_a_batch_of_ragged_prompts(name: str) -> None:
    same(*pair(name), ROWS, name)


@pytest.mark.parametrize("passes", [("dense",), ("dense", "pure"), ("sparse", "pure"), ("fused",)])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_other_passes(name: str, passes: tuple[str, ...]) -> None:
    same(*pair(name, passes), ROWS, name)


def test_dense_is_the_unmodified_model() -> None:
    """Not only the same as our own graphs: transformers' own answers."""
    rows: list[tiny.Row] = [[Image(1), *words(5)]]
    new = same(*pair("llava", ("dense",)), rows, "llava")
    assert new.tolist() == tiny.dense_rows("llava", rows, NEW)


def test_videos_and_sizes_without_another_export() -> None:
    one, other = pair("qwen")
    for rows in (
        [[Video(1), *words(4)]],
        [[Video(2, (4, 4, 6)), 30, Image(1, (2, 2)), *words(2)], [Image(4, (8, 4)), 31]],
        [words(1)],
    ):
        same(one, other, rows, "qwen")


def test_long_prompts_come_in_chunks() -> None:
    one, other = pair("llava")
    other.engine.runner.prefill_chunk = 8  # of 128 at least a row: the prompt is longer
    row: tiny.Row = [Image(1), *words(125)]
    prompt = tiny.inputs("llava", [row])
    expected = one.generate(**prompt, **tiny.greedy(8))
    ran: list[int] = []
    run = other.engine.runner.run

    def watched(component: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ran.append(inputs["inputs_embeds"].shape[1] if "inputs_embeds" in inputs else 0)
        return run(component, inputs)

    other.engine.runner.run = watched  # type: ignore[method-assign]
    try:
        assert torch.equal(other.generate(**prompt, **tiny.greedy(8)), expected)
    finally:
        del other.engine.runner.run  # type: ignore[method-assign]
    assert sum(n > 1 for n in ran) == 2, "two chunks"


def test_conversations_over_a_growing_cache() -> None:
    """Turns, a cache that must grow and move, and two dialogues that take turns."""
    one, other = pair("llava")
    rows: list[list[tiny.Item]] = [[Image(1), *words(4)], [Image(2), *words(3, 1)]]
    talks = [[m.conversation() for m in (one, other)] for _ in rows]
    capacities = set()
    for turn in range(4):
        for i, (left, right) in enumerate(talks):
            prompt = tiny.inputs("llava", [rows[i]])
            expected = one.generate(**prompt, conversation=left, **tiny.greedy(NEW))
            found = other.generate(**prompt, conversation=right, **tiny.greedy(NEW))
            assert torch.equal(found, expected)
            answer = expected[0, prompt["input_ids"].shape[1] :].tolist()
            rows[i] = tiny.continued(rows[i], answer, *words(3, 10 * turn + i))
            assert right.cache is not None
            capacities.add(right.cache.capacity)
    assert len(capacities) > 1, "the cache grew"


def test_a_conversation_rolls_back() -> None:
    one, other = pair("llava")
    left, right = one.conversation(), other.conversation()
    for row in ([Image(1), *words(6)], [Image(1), *words(6)], [Image(1), 50, 51], [Image(3), 50]):
        prompt = tiny.inputs("llava", [row])
        expected = one.generate(**prompt, conversation=left, **tiny.greedy(8))
        found = other.generate(**prompt, conversation=right, **tiny.greedy(8))
        assert torch.equal(found, expected)


def test_rows_that_end_early_write_nothing_more() -> None:
    one, other = pair("llava")
    prompt = tiny.inputs("llava", [[Image(1), *words(5)], [Image(2), *words(2)]])
    plain = one.generate(**prompt, **tiny.greedy(NEW))
    end = int(plain[0, prompt["input_ids"].shape[1] + 3])
    arguments = tiny.greedy(NEW, eos_token_id=end)
    expected = one.generate(**prompt, **arguments)
    assert not torch.equal(expected, plain)
    assert torch.equal(other.generate(**prompt, **arguments), expected)


def test_sampling_draws_the_same() -> None:
    one, other = pair("llava")
    prompt = tiny.inputs("llava", [[Image(1), *words(5)]])
    drawn = []
    for model in (one, other):
        torch.manual_seed(3)
        drawn.append(model.generate(**prompt, do_sample=True, top_k=20, max_new_tokens=16))
    assert torch.equal(*drawn)


def test_chat_sessions(tmp_path: Path) -> None:
    picture = tiny_checkpoint.picture(tmp_path / "a.png", 1)
    said = []
    for model in pair("llava"):
        session = model.chat()
        session.add_image(picture)
        said.append([session.ask(q, **tiny.greedy(6)) for q in ("w20 w21", "w30", "w40 w41")])
        session.evict()
        said[-1].append(session.ask("w22", **tiny.greedy(6)))
    assert said[0] == said[1]
    assert len(set(said[0])) > 1


def test_caches_stay_where_they_are() -> None:
    """The output of a cache is the memory of its input: nothing else may hold new tokens."""
    _, other = pair("llava")
    conversation = other.conversation()
    prompt = tiny.inputs("llava", [[Image(1), *words(5)]])
    other.generate(**prompt, conversation=conversation, **tiny.greedy(4))
    assert conversation.cache is not None
    used = conversation.cache.lens[0]
    for name, tensor in conversation.cache.tensors.items():
        written = tensor[0].abs().sum((0, 2)) > 0
        assert bool(written[:used].all()), name
        assert not bool(written[used:].any()), f"{name}: written behind its end"


def test_a_wrong_graph_output_would_show() -> None:
    """The comparison fails where a component returns something else."""
    one, other = pair("llava")
    run = other.engine.runner.run

    def broken(component: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = run(component, inputs)
        return {k: v.roll(1, -1) if k == "logits" else v for k, v in out.items()}

    other.engine.runner.run = broken  # type: ignore[method-assign]
    try:
        with pytest.raises(AssertionError):
            same(one, other, ROWS, "llava")
    finally:
        del other.engine.runner.run  # type: ignore[method-assign]
