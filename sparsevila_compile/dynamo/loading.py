"""Loading AWQ checkpoints for the backend where transformers cannot, or only for kernels of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.errors import UserError


def load_awq(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Any:
    """A stock transformers model from an AWQ checkpoint, without GPTQModel and without a GPU.

    Its quantized linears keep the checkpoint's tensors and run by the op's reference: slowly, until
    the model is compiled.

    Args:
        path: checkpoint directory, or a hub id.
        dtype: of what is not quantized; the checkpoint's by default.

    Raises:
        UserError: the checkpoint is damaged, or not quantized by AWQ.
    """
    where = str(Path(path).expanduser()) if Path(path).expanduser().exists() else str(path)
    config = hf.load_config(where, revision=revision)
    if hf.awq_format(config, f"{where}: config.json") is None:
        raise UserError(f"{where}: is not quantized; load it with from_pretrained")
    return hf.load_model(where, dtype=dtype, device=torch.device(device), revision=revision)
