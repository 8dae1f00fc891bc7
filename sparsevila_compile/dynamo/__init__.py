"""``torch.compile(backend="sparsevila")``: stock transformers models, stock ``generate``.

Torch finds the backend by its entry point; nothing of this package need be imported.
:func:`report` says what it did to a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["BackendReport", "load_awq", "report"]

if TYPE_CHECKING:
    from .backend import report
    from .backend_report import BackendReport
    from .loading import load_awq


def __getattr__(name: str) -> Any:
    # Lazily: torch loads .backend by its entry point, and only then may Dynamo be set up for it.
    if name == "report":
        from .backend import report

        return report
    if name == "load_awq":
        from .loading import load_awq

        return load_awq
    if name == "BackendReport":
        from .backend_report import BackendReport

        return BackendReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
