"""What tracing needs of transformers: its attention interface and the parts of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Family
from sparsevila_compile.ops import ATTENTION

TRACE_ATTENTION = "sparsevila_flash"  # the word "flash" makes packed encoders hand over cu_seqlens


def _trace_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    if attention_mask is not None:
        raise UserError(
            f"{name} builds an attention mask of its own; only causal, windowed, packed and full attention are supported"
        )
    for feature in ("softcap", "s_aux", "position_bias", "block_mask"):
        if extra.get(feature) is not None:
            raise UserError(f"{name} uses attention with {feature}, which is not supported")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if scaling is None:
        scaling = float(query.shape[-1]) ** -0.5
    out = ATTENTION(
        query, key, value, cu_seq_lens_q, float(scaling), is_causal, int(sliding_window or 0)
    )
    return out, None


@contextlib.contextmanager
def traceable_attention(model: Any) -> Iterator[None]:
    """Within this context every attention of the model is one ``sparsevila::attention`` call."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(TRACE_ATTENTION, _trace_attention)
    AttentionMaskInterface.register(TRACE_ATTENTION, lambda *args, **kwargs: None)
    # The public setter refuses unknown flash names and does not reach every sub-config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(c, getattr(c, "_attn_implementation_internal", None)) for c in configs.values()]
    try:
        for config, _ in saved:
            config._attn_implementation_internal = TRACE_ATTENTION
        yield
    finally:
        for config, name in saved:
            config._attn_implementation_internal = name


def base_model(model: Any) -> Any:
    """The model below the language-model head."""
    return model.model


def part(model: Any, family: Family, name: str) -> torch.nn.Module:
    """A named part of the model.

    Raises:
        UserError: the accessor is missing in this transformers version or model.
    """
    base = base_model(model)
    found: Any
    if name == "text model":
        found = getattr(base, "language_model", None)
    elif name == "encoder":
        found = base.get_encoder("image")
    elif name == "projector":
        found = getattr(base, family.projector or "", None)
    elif name == "embedding":
        found = model.get_input_embeddings()
    else:
        found = model.get_output_embeddings()
    if found is None or found is base:
        raise UserError(
            f"{family.model_type}: the model has no {name} where transformers keeps it; this version is not supported"
        )
    return found  # type: ignore[no-any-return]
