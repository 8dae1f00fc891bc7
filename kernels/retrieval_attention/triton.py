"""``retrieval_attention`` in Triton: split keys over [index | tail], read in place."""

from __future__ import annotations

import torch

from ..attention.triton import check_tensors
from ..cached_attention.split_kv import split_kv_forward
from ..registry import Reason


def supports_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    index: torch.Tensor,
    tail_start: torch.Tensor,
    scale: float,
) -> Reason:
    """``supports_args`` of the Triton implementation."""
    return check_tensors(q, k_cache, v_cache)


def retrieval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    index: torch.Tensor,
    tail_start: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See :func:`.reference.reference`. Nothing is read on the host: may be captured in a graph.

    An index entry at or past tail_start[b] or cache_lens[b] counts as absent, since no error can be
    raised from here.
    """
    return split_kv_forward(
        q, k, v, k_cache, v_cache, cache_lens, new_lens, scale, index=index, tail_start=tail_start
    )
