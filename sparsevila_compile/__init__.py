"""Compile Hugging Face vision-language models into sparse, quantized ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from sparsevila_compile.model import load


def __getattr__(name: str) -> Any:
    # Lazily: importing the package must not import torch (the command's --help is instant).
    if name == "load":
        from sparsevila_compile.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
