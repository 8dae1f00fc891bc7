"""Graph passes, one idea a file. Importing this package registers them all."""

from . import (
    canonicalize,
    conv_to_linear,
    fp8_prefill,
    fuse_rms_norm,
    fuse_rotary,
    fuse_silu_mul,
    insert_kv_cache,
    lower_ops,
    merge_linears,
    pad_linears,
    prune_visual_tokens,
    quantize_linear,
    repack_awq,
    sparsify_decode_attention,
    trim_last_layer,
)

__all__ = [
    "canonicalize",
    "conv_to_linear",
    "fp8_prefill",
    "fuse_rms_norm",
    "fuse_rotary",
    "fuse_silu_mul",
    "insert_kv_cache",
    "lower_ops",
    "merge_linears",
    "pad_linears",
    "prune_visual_tokens",
    "quantize_linear",
    "repack_awq",
    "sparsify_decode_attention",
    "trim_last_layer",
]
