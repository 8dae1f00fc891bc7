"""The page of ONNX ops says what the schemas say."""

from __future__ import annotations

from pathlib import Path

from sparsevila_compile.kernels.onnx_support import DOMAIN_VERSION, OPSET, OnnxOp, Port
from sparsevila_compile.onnx.canonical import ONNX_OPS

PAGE = Path(__file__).parents[2] / "docs" / "onnx-ops.md"


def section(op: OnnxOp) -> str:
    """An op as the page has it."""

    def listed(ports: tuple[Port, ...]) -> str:
        return ", ".join(
            f"[{p.name}: {p.kind}]" if p.optional else f"{p.name}: {p.kind}" for p in ports
        )

    attributes = ", ".join(f"{name}: {kind}" for name, kind in op.attributes.items())
    return (
        f"### {op.name}\n\n`({listed(op.inputs)}) -> ({listed(op.outputs)})`"
        f"{f'; attributes `{attributes}`' if attributes else ''}\n\n{op.doc}\n"
    )


def test_the_page_has_every_op_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    _, _, ops = text.partition("## Ops\n\n")
    assert ops == "\n".join(section(op) for op in ONNX_OPS)
    assert f"Version {DOMAIN_VERSION}." in text
    assert f"(opset {OPSET})" in text
