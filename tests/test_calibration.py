"""Calibration: the file's mistakes, what is fed, and the walk through the graph."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila_compile.calibration import (
    Lockstep,
    Sample,
    component_inputs,
    read_samples,
    tokenize,
)
from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.passes.scale_folding import weight_of
from sparsevila_compile.program import Component, Program
from tests import tiny, tiny_checkpoint
from tests.passes.quantizing import Prompts, prompt, row

aten = torch.ops.aten
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w20 w21"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "w30"}]},
]


def write(folder: Path, *lines: Any) -> Path:
    """A calibration file; pictures a.png and b.png lie beside it."""
    for seed, name in enumerate(("a.png", "b.png")):
        tiny_checkpoint.picture(folder / name, seed)
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


# ---- the file


def test_reads_conversations(tmp_path: Path) -> None:
    separator = "line\u2028separator"  # a line of JSON may hold it; only \n ends a line
    path = write(
        tmp_path,
        {"image": "a.png", "messages": MESSAGES},
        "",
        {"images": ["a.png", "b.png"], "messages": [separator]},
        {"messages": []},
        "",
    )
    samples = read_samples(path, 9)
    assert [s.where for s in samples] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert [len(s.pictures) for s in samples] == [1, 2, 0]
    assert samples[0].messages == MESSAGES
    assert samples[1].messages == [separator]
    assert samples[0].pictures[0].mode == "RGB"
    assert samples[1].pictures[0].tobytes() == samples[0].pictures[0].tobytes()
    assert samples[1].pictures[1].tobytes() != samples[0].pictures[0].tobytes()


def test_reads_no_further_than_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [1]}, {"messages": [2]}, "damaged")
    assert [s.messages for s in read_samples(path, 2)] == [[1], [2]]
    with pytest.raises(UserError, match=":3: "):
        read_samples(path, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "want {"),
        ("3", "want {"),
        ("null", "want {"),
        ({"image": "a.png"}, "want {"),
        ({"image": "a.png", "messages": "hello"}, "want {"),
        ({"image": None, "messages": MESSAGES}, "want {"),
        ({"image": 3, "messages": MESSAGES}, "want {"),
        ({"image": "", "messages": MESSAGES}, "want {"),
        ({"images": "a.png", "messages": MESSAGES}, "want {"),
        ({"images": [["a.png"]], "messages": MESSAGES}, "want {"),
        ({"image": "none.png", "messages": MESSAGES}, "none.png: no such picture"),
        ({"image": "data.jsonl", "messages": MESSAGES}, "not a picture"),
        ({"image": ".", "messages": MESSAGES}, "not a picture"),
        ({"image": "a\0b.png", "messages": MESSAGES}, "null"),
    ],
    ids=lambda v: str(v)[:40].replace("\0", "0"),
)
def test_damaged_lines(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, {"messages": MESSAGES}, line)
    with pytest.raises(UserError) as caught:
        read_samples(path, 2)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text


def test_cut_off_picture(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.png", "messages": MESSAGES})
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*a\.png: not a picture"):
        read_samples(path, 1)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such calibration file"):
        read_samples(tmp_path / "gone.jsonl", 1)
    with pytest.raises(UserError, match="cannot read the calibration data"):
        read_samples(tmp_path, 1)
    for content in (b"", b"\n \n\n"):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(UserError, match="empty: no calibration conversation"):
            read_samples(tmp_path / "empty", 1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: cannot read the calibration data"):
        read_samples(tmp_path / "binary", 1)


# ---- prompts


def test_the_processor_sees_text_and_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.png", "messages": MESSAGES})
    [sample] = read_samples(path, 1)
    inputs = tokenize(tiny_checkpoint.processor(), sample)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tiny.IMAGE) == tiny_checkpoint.VISUAL_TOKENS
    assert 20 in ids
    assert 30 in ids, "answers are fed too"
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize("messages", [[], [3], [{"role": "user", "content": 3}]], ids=str)
def test_what_the_processor_refuses(messages: list[Any]) -> None:
    program = tiny.at_stage("llava", "insert_kv_cache")
    sample = Sample("data.jsonl:4", messages, [])
    with pytest.raises(UserError) as caught:
        component_inputs(program, "language", tiny_checkpoint.processor(), [sample])
    assert str(caught.value).startswith("data.jsonl:4: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["language", "vision"])
def test_placeholders_and_pictures_that_do_not_fit(tmp_path: Path, component: str) -> None:
    program = tiny.at_stage("llava", "insert_kv_cache")
    good = read_samples(write(tmp_path, {"image": "a.png", "messages": MESSAGES}), 1)
    component_inputs(program, component, tiny_checkpoint.processor(), good)
    bad = Sample("data.jsonl:2", MESSAGES, good[0].pictures * 2)
    with pytest.raises(UserError, match=r"^data\.jsonl:2: "):
        component_inputs(program, component, tiny_checkpoint.processor(), [*good, bad])


def test_vision_needs_pictures() -> None:
    program = tiny.at_stage("llava", "insert_kv_cache")
    text = Prompts("llava", lambda seed: tiny.words(5, seed))
    sample = Sample("data.jsonl:1", [{"content": "0"}], [])
    with pytest.raises(UserError, match=r"^data\.jsonl:1: no picture"):
        component_inputs(program, "vision", text, [sample])
    _, [inputs] = component_inputs(program, "language", text, [sample])
    assert inputs["inputs_embeds"].shape[:2] == (1, 6)


def samples(count: int = 4) -> list[Sample]:
    return [Sample(f"line {i}", [{"content": str(i)}], []) for i in range(count)]


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_language_inputs_have_no_padding(name: str, keep: float) -> None:
    """One row each, only real tokens, pruned ones left out; logits of every text token."""
    program = tiny.traced(name)
    tiny.step(program, ("prune_visual_tokens", {"keep_ratio": keep}), "insert_kv_cache")
    component, inputs = component_inputs(program, "language", Prompts(name), samples())
    lengths = set()
    for seed, given in enumerate(inputs):
        ids = tiny.inputs(name, [row(seed)])["input_ids"][0]
        pictures = int((ids == tiny.IMAGE).sum())
        text = len(ids) - pictures
        visual = given["inputs_embeds"].shape[1] - text
        assert visual == pictures if keep == 1.0 else 0 < visual < pictures
        assert given["new_lens"].tolist() == [text + visual]
        assert given["cache_lens"].tolist() == [0]
        assert given["logit_rows"].shape == (1, text)
        table = tiny.model(name).get_input_embeddings().weight
        at_text = given["inputs_embeds"][0, given["logit_rows"][0]]
        assert torch.equal(at_text, table[ids[ids != tiny.IMAGE]])
        lengths.add(text + visual)
    assert len(lengths) > 1
    assert {n.kwargs.get("impl") for n in component.graph.nodes if "impl" in n.kwargs} == {
        "library"
    }


def linears(component: Component) -> list[fx.Node]:
    return [n for n in component.graph.nodes if n.target is aten.linear.default]


@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_linears_see_what_they_see_in_the_model(name: str, part: str) -> None:
    """Against hooks on transformers' own model, for every linear and sample."""
    program = tiny.at_stage(name, "canonicalize", "insert_kv_cache")
    component, inputs = component_inputs(program, part, Prompts(name), samples())
    model = tiny.model(name)
    seen: dict[str, list[torch.Tensor]] = {}
    modules = {f"{n}.weight": m for n, m in model.named_modules()}
    wanted = linears(component)
    hooks = []
    for node in wanted:
        weight = weight_of(node)
        assert weight is not None

        def keep(module: Any, args: Any, key: str = weight) -> None:
            seen.setdefault(key, []).append(args[0].detach().clone())

        hooks.append(modules[weight].register_forward_pre_hook(keep))
    for seed in range(4):
        model(**tiny.inputs(name, [row(seed)]))
    for hook in hooks:
        hook.remove()
    visited = []

    def visit(node: fx.Node, values: list[torch.Tensor]) -> None:
        weight = weight_of(node)
        assert weight is not None
        visited.append(weight)
        assert len(values) == 4
        for seed, (value, expected) in enumerate(zip(values, seen[weight], strict=True)):
            if weight.startswith("lm_head"):
                ids = tiny.inputs(name, [row(seed)])["input_ids"][0]
                expected = expected[:, ids != tiny.IMAGE]
            assert value.numel() == expected.numel()
            torch.testing.assert_close(
                value.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3
            )

    Lockstep(component, program.weights).run(inputs, wanted, visit)
    assert visited == [weight_of(n) for n in wanted]
    assert len(visited) > 10


# ---- the walk


def test_what_a_linear_computes_instead_reaches_the_next() -> None:
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    component, inputs = component_inputs(program, "language", Prompts("llava"), samples(2))
    first, *_, last = linears(component)
    changed: dict[bool, list[torch.Tensor]] = {}
    for zero in (False, True):

        def visit(node: fx.Node, values: list[torch.Tensor], zero: bool = zero) -> Any:
            if node is last:
                changed[zero] = values
            if zero and node is first:
                return lambda x: torch.zeros(*x.shape[:-1], 64)
            return None

        fresh = [{k: v.clone() for k, v in one.items()} for one in inputs]
        Lockstep(component, program.weights).run(fresh, [first, last], visit)
    for plain, zeroed in zip(changed[False], changed[True], strict=True):
        assert plain.shape == zeroed.shape
        assert not torch.allclose(plain, zeroed)


def test_stops_behind_the_last_that_is_wanted() -> None:
    """Nothing is computed for nobody: not the linear itself if it is not replaced, nor what follows."""
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    component, inputs = component_inputs(program, "language", Prompts("llava"), samples(2))
    wanted = linears(component)[:5]
    calls: list[Any] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        Lockstep(component, program.weights).run(inputs, wanted, lambda node, values: None)
    attentions = [c for c in calls if "attention" in str(c)]
    assert len(attentions) == 2, "one layer's, for two samples"


def chain(depth: int, width: int = 64) -> tuple[Component, dict[str, torch.Tensor]]:
    """``x`` through linears of one weight with a sum after each: as deep as asked."""
    graph = fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(8, width)
    out = graph.output((x,))
    component = Component("chain", graph, ("out",))
    edit = Editor(component)
    node = x
    for i in range(depth):
        weight = edit.weight(f"w{i}", torch.empty(width, width), before=out)
        made = edit.call(aten.linear.default, node, weight, before=out)
        node = edit.call(aten.add.Tensor, made, node, before=out)
    out.args = ((node,),)
    torch.manual_seed(0)
    return component, {f"w{i}": torch.randn(width, width) for i in range(depth)}


class Live(TorchDispatchMode):
    """Counts the bytes of results that are still alive; ``peak`` is the most at any op."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.data_ptr() not in given:  # no view
            size = result.numel() * result.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(result, self._gone, size)
        return result


@pytest.mark.parametrize("count", [1, 5])
def test_memory_does_not_grow_with_depth(count: int) -> None:
    peaks = []
    for depth in (3, 30):
        component, weights = chain(depth)
        inputs = [{"x": torch.randn(8, 64)} for _ in range(count)]
        gone = [weakref.ref(one["x"]) for one in inputs]
        live = Live()
        seen = []

        def visit(node: fx.Node, values: list[torch.Tensor], seen: Any = seen) -> None:
            seen.append(len(values))

        with live:
            Lockstep(component, weights).run(inputs, linears(component), visit)
        assert seen == [count] * depth
        assert all(not one for one in inputs), "inputs are let go of"
        assert all(ref() is None for ref in gone)
        assert live.now == 0
        peaks.append(live.peak)
    # Of each sample what a linear reads and gives, and one sum more.
    assert peaks[0] == peaks[1] == (2 * count + 1) * 8 * 64 * 4


def test_caches_are_let_go_of_layer_by_layer() -> None:
    program: Program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    component, inputs = component_inputs(program, "language", Prompts("llava"), samples(2))
    caches = [weakref.ref(one["k_cache_0"]) for one in inputs]
    alive = []

    def visit(node: fx.Node, values: list[torch.Tensor]) -> None:
        alive.append(sum(ref() is not None for ref in caches))

    Lockstep(component, program.weights).run(inputs, linears(component), visit)
    assert alive[:3] == [2, 2, 2], "q, k and v come before attention"
    assert set(alive[3:]) == {0}


def test_prompt_helper_is_not_the_calibration_data() -> None:
    """Held-out prompts of these tests are none that calibration saw."""
    seen = [tiny.inputs("llava", [row(seed)])["input_ids"] for seed in range(10)]
    held = prompt("llava")["input_ids"]
    assert all(not torch.equal(held, one) for one in seen)
