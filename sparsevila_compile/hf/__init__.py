"""Everything this package takes from transformers that is not plain public API."""

from .checkpoints import (
    empty_model,
    load_config,
    load_model,
    load_processor,
    quiet,
)
from .quantized import adopt_awq, awq_format, awq_linears, check_adopted, parameter_count
from .runtime import GenerationTools, RopeIndex, host_vision_inputs
from .tracing import TRACE_ATTENTION, base_model, part, traceable_attention

__all__ = [
    "TRACE_ATTENTION",
    "GenerationTools",
    "RopeIndex",
    "adopt_awq",
    "awq_format",
    "awq_linears",
    "base_model",
    "check_adopted",
    "empty_model",
    "host_vision_inputs",
    "load_config",
    "load_model",
    "load_processor",
    "parameter_count",
    "part",
    "quiet",
    "traceable_attention",
]
