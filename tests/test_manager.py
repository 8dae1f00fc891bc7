"""The pass manager: order, zero matches, roll-back whatever goes wrong, reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.manager import fingerprint, look, run_passes, steps_for
from sparsevila_compile.pass_base import (
    PASSES,
    Context,
    Match,
    Miss,
    Pass,
    PassConfig,
    PassError,
    calls,
    register,
)
from sparsevila_compile.program import STAGES, Program, Stage
from tests import tiny

aten = torch.ops.aten


class Fake(Pass[PassConfig]):
    """Wraps the first ReLU-like op of the language model in something; to be broken by subclasses."""

    name = "fake"
    stage: ClassVar[Stage] = "prune"
    summary = "for tests"
    config_type = PassConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for i, node in enumerate(calls(program, "language", aten.silu.default)):
            if node.meta.get("fake"):
                yield Miss("language", "done already", "", node.name)
            elif i == 0:
                yield Match("language", node, where="first")
            else:
                yield Miss("language", "not the first", "", node.name)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component("language"))
        node = match.node
        new = edit.call(aten.mul.Tensor, node, 1.0, before=next(iter(node.users)), origin=node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        node.meta["fake"] = True
        program.weights["new.weight"] = torch.zeros(1)
        context.notes["seen"] = match.node.name


def fake(**methods: Any) -> Fake:
    """An instance with some methods replaced."""
    kind = type("Changed", (Fake,), methods)
    return kind(PassConfig())


def run(program: Program, *passes: Pass[Any]) -> list[Any]:
    return run_passes(program, passes, Context())


# ---------------------------------------------------------------------- order


ORDERS: dict[str, tuple[list[str], str, int]] = {
    "prune after cache": (
        ["insert_kv_cache", "prune_visual_tokens"],
        r"prune_visual_tokens \(stage prune\) is listed after insert_kv_cache \(stage cache\)",
        1,
    ),
    "cache after sparsify": (["sparsify_decode_attention", "insert_kv_cache"], "stage cache", 1),
    "canonicalize last": (["insert_kv_cache", "canonicalize"], "stage canonicalize", 1),
    "after lowering": (
        ["insert_kv_cache", "lower_ops", "sparsify_decode_attention"],
        "sparsify",
        2,
    ),
    "cache twice": (["insert_kv_cache", "insert_kv_cache"], "listed twice", 1),
    "prune twice": (
        ["prune_visual_tokens", "prune_visual_tokens"],
        r"prune_visual_tokens is listed twice \(first as number 1\)",
        1,
    ),
    "lower twice": (["insert_kv_cache", "lower_ops", "lower_ops"], "listed twice", 2),
    "apart": (["canonicalize", "insert_kv_cache", "canonicalize"], "listed twice", 2),
}
RATIO = {"prune_visual_tokens", "sparsify_decode_attention"}


def _spec(name: str) -> tiny.Spec:
    return (name, {"keep_ratio": 0.5}) if name in RATIO else name


@pytest.mark.parametrize("case", ORDERS)
def test_order_is_checked_before_anything_runs(case: str) -> None:
    names, message, index = ORDERS[case]
    program = tiny.traced("llava")
    before = fingerprint(program)
    with pytest.raises(PassError, match=message) as caught:
        tiny.run(program, *map(_spec, names))
    assert caught.value.index == index
    assert fingerprint(program) == before
    assert program.passes == []


def test_what_the_compiler_adds() -> None:
    steps = steps_for(tiny.make_passes("insert_kv_cache"))
    assert [(p.name, i) for p, i in steps] == [
        ("canonicalize", None),
        ("insert_kv_cache", 0),
        ("lower_ops", None),
    ]
    listed = steps_for(tiny.make_passes("canonicalize", "insert_kv_cache", "lower_ops"))
    assert [i for _, i in listed] == [0, 1, 2]


def test_every_pass_has_a_stage_and_says_what_it_does() -> None:
    for name, kind in PASSES.items():
        assert kind.name == name
        assert kind.stage in STAGES
        assert kind.summary
        for key, field in kind.config_type.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_two_passes_of_one_name() -> None:
    with pytest.raises(ValueError, match="two passes are named insert_kv_cache"):
        register(type("Other", (Fake,), {"name": "insert_kv_cache"}))


# ---------------------------------------------------------------------- matching nothing


def _nothing(self: Fake, program: Program) -> Iterator[Match | Miss]:
    yield Miss("language", "too small", "a")
    yield Miss("language", "too small", "b")
    yield Miss("vision", "too large", "c")


def test_zero_matches_is_an_error() -> None:
    program = tiny.traced("llava")
    tiny.step(program, "canonicalize")
    before = fingerprint(program)
    message = r"fake matches nothing \(2 × too small; 1 × too large\); .* optional: true"
    with pytest.raises(PassError, match=message) as caught:
        tiny.step(program, fake(match=_nothing))
    assert caught.value.index == 0
    assert fingerprint(program) == before
    with pytest.raises(PassError, match="nothing in the model looks like it"):
        tiny.step(program, fake(match=lambda self, program: iter(())))


def test_zero_matches_may_be_allowed() -> None:
    program = tiny.traced("llava")
    pass_ = fake(match=_nothing, ensures=lambda self, program: None)
    pass_.config = PassConfig(optional=True)
    reports = run(program, pass_, *tiny.make_passes("insert_kv_cache"))
    [report] = [r for r in reports if r.name == "fake"]
    assert not report.modified
    assert report.matches == ()
    assert report.miss_count == 3
    assert {g.reason: len(g.sites) for g in report.misses} == {"too small": 2, "too large": 1}


def test_an_optional_pass_that_finds_nothing_leaves_a_model_that_works() -> None:
    """Sliding windows in every layer: nothing to retrieve, and the report says why."""
    program = tiny.traced("llava_windowed")
    specs: tuple[tiny.Spec, ...] = (
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.1}),
    )
    with pytest.raises(PassError, match="2 × sliding-window attention"):
        tiny.run(program.snapshot(), *specs)
    optional = (specs[0], ("sparsify_decode_attention", {"keep_ratio": 0.1, "optional": True}))
    [report] = [r for r in tiny.run(program, *optional) if r.name.startswith("sparsify")]
    assert report.matches == ()
    assert report.miss_count == 2
    model = tiny.compiled("llava_windowed", *optional)
    prompt = tiny.inputs("llava_windowed", [[tiny.Image(1), *tiny.words(5)]])
    expected = tiny.dense("llava_windowed", prompt)
    assert torch.equal(model.generate(**prompt, **tiny.greedy()), expected)


# ---------------------------------------------------------------------- roll-back


class _Interrupt(BaseException):
    pass


def _raising(error: BaseException, after: str) -> Callable[..., None]:
    """A method that does the real thing, then fails."""

    def method(self: Fake, *args: Any) -> None:
        getattr(Fake, after)(self, *args)
        raise error

    return method


def _leaves_python_call(self: Fake, program: Program, *rest: Any) -> None:
    Fake.rewrite(self, program, *rest)
    node = next(calls(program, "language", aten.silu.default))
    with node.graph.inserting_after(node):
        new = node.graph.call_function(print, (node,))
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _forgets_value(self: Fake, program: Program, *rest: Any) -> None:
    Fake.rewrite(self, program, *rest)
    del next(calls(program, "language", aten.mul.Tensor)).meta["val"]


def _drops_weight(self: Fake, program: Program, *rest: Any) -> None:
    Fake.rewrite(self, program, *rest)
    del program.weights["lm_head.weight"]


def _edits_then_undoes(self: Fake, program: Program, *rest: Any) -> None:
    pass


def _drops_output(self: Fake, program: Program, *rest: Any) -> None:
    Fake.rewrite(self, program, *rest)
    program.component("language").output_node().args = ((),)


def _removes_component(self: Fake, program: Program, *rest: Any) -> None:
    Fake.rewrite(self, program, *rest)
    del program.components["vision"]
    program.prune = None
    program.max_length = 99
    raise UserError("no")


FAILURES: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "requires": (
        {"requires": _raising(UserError("not ready"), "requires")},
        PassError,
        "not ready",
    ),
    "match": ({"match": _raising(UserError("odd"), "requires")}, PassError, "odd"),
    "rewrite": ({"rewrite": _raising(UserError("cannot"), "rewrite")}, PassError, "cannot"),
    "finish": ({"finish": _raising(UserError("late"), "finish")}, PassError, "late"),
    "ensures": ({"ensures": _raising(GraphError("broken"), "ensures")}, GraphError, "broken"),
    "bug": ({"rewrite": _raising(ZeroDivisionError("oops"), "rewrite")}, ZeroDivisionError, "oops"),
    "interrupt": ({"finish": _raising(_Interrupt("stop"), "finish")}, _Interrupt, "stop"),
    "python call": ({"rewrite": _leaves_python_call}, GraphError, "call of"),
    "no value": ({"rewrite": _forgets_value}, GraphError, "no value metadata"),
    "no weight": ({"rewrite": _drops_weight}, GraphError, "no weight lm_head.weight"),
    "no output": ({"rewrite": _drops_output}, GraphError, "outputs are not the declared"),
    "component": ({"rewrite": _removes_component}, PassError, "no"),
    "no change": (
        {"rewrite": _edits_then_undoes},
        GraphError,
        "matched 1 times and changed nothing",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_whatever_fails_the_program_is_as_before(case: str) -> None:
    methods, error, message = FAILURES[case]
    program = tiny.traced("llava")
    tiny.step(program, "canonicalize")
    before, weights = fingerprint(program), dict(program.weights)
    state = (program.stage, list(program.passes), program.max_length, program.taps)
    with pytest.raises(error, match=message):
        tiny.step(program, fake(**methods))
    assert fingerprint(program) == before
    assert {k: id(w) for k, w in program.weights.items()} == {k: id(w) for k, w in weights.items()}
    assert (program.stage, program.passes, program.max_length, program.taps) == state
    # And it still compiles into what it would have become.
    tiny.step(program, "insert_kv_cache", "lower_ops")
    assert program.stage == "lower"


def test_passes_before_the_failing_one_stay() -> None:
    program = tiny.traced("llava")
    with pytest.raises(PassError, match="layer: 9 is outside the encoder's 3 layers") as caught:
        tiny.run(program, ("prune_visual_tokens", {"keep_ratio": 0.5, "layer": 9}))
    assert caught.value.index == 0
    assert program.passes == ["canonicalize"]
    assert program.stage == "canonicalize"


def test_a_compiled_program_is_not_compiled_again() -> None:
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache")
    before = fingerprint(program)
    with pytest.raises(PassError, match="comes too late: the program is at stage lower"):
        tiny.run(program, ("prune_visual_tokens", {"keep_ratio": 0.5}))
    assert fingerprint(program) == before
    assert program.stage == "lower"


def test_without_a_cache_nothing_can_answer() -> None:
    program = tiny.traced("llava")
    with pytest.raises(PassError, match="no KV cache to answer with; list insert_kv_cache"):
        tiny.run(program, ("prune_visual_tokens", {"keep_ratio": 0.5}))


# ---------------------------------------------------------------------- reports


def test_reports() -> None:
    program = tiny.traced("llava")
    nodes, size = program.node_count(), program.weight_bytes()
    seen, started = [], []
    reports = run_passes(
        program,
        [fake(), *tiny.make_passes("insert_kv_cache")],
        Context(),
        seen.append,
        started.append,
    )
    assert seen == reports
    assert started == [r.name for r in reports] == program.passes
    assert [r.index for r in reports] == [None, 0, 1, None]
    assert reports[0].nodes_before == nodes
    assert reports[0].bytes_before == size
    for earlier, later in itertools.pairwise(reports):
        assert earlier.nodes_after == later.nodes_before
        assert earlier.bytes_after == later.bytes_before
    assert reports[-1].nodes_after == program.node_count()
    report = reports[1]
    assert [s.where for s in report.matches] == ["first"]
    assert report.miss_count == 1
    assert report.modified
    assert report.notes == {"seen": report.matches[0].node}
    assert all(r.seconds > 0 and r.peak_memory_bytes > 1 << 20 for r in reports)
    assert reports[2].notes["max_length"] == 2048
    for r in reports:
        assert type(r).model_validate_json(r.model_dump_json()) == r


def test_looking_changes_nothing() -> None:
    program = tiny.traced("llava")
    before = fingerprint(program)
    for name, kind in PASSES.items():
        options = {"keep_ratio": 0.5} if name in RATIO else {}
        if name in ("quantize_linear", "lower_ops", "sparsify_decode_attention"):
            continue
        look(program, kind(kind.config_type(**options)))
        assert fingerprint(program) == before, name
