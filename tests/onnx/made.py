"""Tiny programs as bundles, for the tests of this directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.onnx import bundle
from sparsevila_compile.onnx.lowering import LowerToOnnx
from sparsevila_compile.pass_base import Context
from sparsevila_compile.program import Program
from tests import tiny, tiny_checkpoint

SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.5, "positions": "compact"}),
    ("insert_kv_cache", {"max_length": 300}),
    # Always: by default a GPU decodes densely where so few tokens are held, as here.
    ("sparsify_decode_attention", {"keep_ratio": 0.3, "share": "kv_head", "when": "always"}),
)
RECIPE = {"version": 1, "passes": [{"insert_kv_cache": {"max_length": 300}}]}


def lowered(name: str, *specs: tiny.Spec, pure: bool = False) -> Program:
    """A tiny program lowered for ONNX; it still runs in torch, on the reference implementations."""
    program = tiny.traced(name)
    lowering = LowerToOnnx.of("auto", pure)
    run_passes(program, tiny.make_passes(*specs), Context(), lowering=lowering)
    return program


def save(program: Program, path: Path, pure: bool = False, **more: Any) -> Path:
    options = LowerToOnnx.of("auto", pure).options
    settings = tiny.model("llava").generation_config
    given = {"recipe": RECIPE, "generation_config": settings, "options": options, **more}
    return bundle.save(program, tiny_checkpoint.processor(), [], path=path, **given)


def in_torch(program: Program) -> CompiledModel:
    return CompiledModel(
        program, tiny_checkpoint.processor(), tiny.model("llava").generation_config
    )
