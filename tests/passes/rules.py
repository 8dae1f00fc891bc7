"""What every pass owes, whatever it does."""

from __future__ import annotations

from typing import Any

import torch

from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.manager import fingerprint, look
from sparsevila_compile.pass_base import PassError
from sparsevila_compile.passes.lower_ops import canonical_op
from sparsevila_compile.program import Program
from sparsevila_compile.report import PassReport
from tests import tiny


def check(program: Program, spec: tiny.Spec) -> PassReport:
    """Run one pass and check what holds for all of them; returns its report.

    Matching changes nothing; every node that is new carries its value, and every canonical op the
    module that it came from; values are what the ops give; a second run finds nothing.
    """
    [pass_] = tiny.make_passes(spec)
    before = fingerprint(program)
    old = {c.name: {n.name for n in c.graph.nodes} for c in program.components.values()}
    matches, _ = look(program, pass_)
    again, _ = look(program, pass_)
    assert [m.site() for m in matches] == [m.site() for m in again], "matching is pure"
    assert fingerprint(program) == before
    [report] = tiny.step(program, spec)
    assert len(report.matches) == len(matches)
    assert report.modified == (fingerprint(program) != before) == bool(matches)
    for component in program.components.values():
        known = old.get(component.name, set())
        for node in component.graph.nodes:
            if node.op == "output" or node.name in known:
                continue
            assert "val" in node.meta, f"{component.name}/{node.name} has no value"
            # `retrieve` comes from no module of the model.
            if canonical_op(node) is not None and component.name != "retrieve":
                assert node.meta.get("module_path"), f"{component.name}/{node.name}: no module"
    _values_are_right(program)
    assert _second_run(program, spec) == 0
    return report


def _second_run(program: Program, spec: tiny.Spec) -> int:
    """Matches of the same pass on its own result; a pass may refuse that outright."""
    [pass_] = tiny.make_passes(spec)
    found = list(pass_.match(program))
    matched = sum(type(f).__name__ == "Match" for f in found)
    before = fingerprint(program)
    try:
        tiny.step(program.snapshot(), spec)
        raise AssertionError("a second run was accepted")
    except PassError:
        assert fingerprint(program) == before
    return matched


def _values_are_right(program: Program) -> None:
    """Every node's value has the shape and dtype that its op gives for its arguments' values."""
    for component in program.components.values():
        edit = Editor(component.clone())
        for node in edit.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            held = node.meta["val"]
            edit.propagate(node)
            made = node.meta["val"]
            where = f"{component.name}/{node.name}"
            assert made.dtype == held.dtype, where
            assert made.dim() == held.dim(), where
            for a, b in zip(made.shape, held.shape, strict=True):
                assert _same_size(a, b), f"{where}: {tuple(made.shape)}, not {tuple(held.shape)}"


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b) or _hint(a) == _hint(b)


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint


def count(program: Program, component: str, target: Any) -> int:
    return sum(n.target is target for n in program.component(component).graph.nodes)
