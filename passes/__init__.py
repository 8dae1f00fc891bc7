"""Graph passes, one idea a file. Importing this package registers them all."""

from . import (
    canonicalize,
    insert_kv_cache,
    lower_ops,
    prune_visual_tokens,
    quantize_linear,
    sparsify_decode_attention,
)

__all__ = [
    "canonicalize",
    "insert_kv_cache",
    "lower_ops",
    "prune_visual_tokens",
    "quantize_linear",
    "sparsify_decode_attention",
]
