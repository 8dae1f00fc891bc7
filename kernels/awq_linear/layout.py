"""The "gemm" layout of AWQ checkpoints, as AutoAWQ writes it and GPTQModel reads it.

A linear of K inputs and N outputs is three tensors:

- ``qweight`` int32 ``[K, N // 8]``: bits ``4 i .. 4 i + 3`` of word ``j`` are the code (0..15) of
  output channel ``8 j + ORDER[i]``.
- ``qzeros`` int32 ``[K // group_size, N // 8]``: zero points, packed alike.
- ``scales`` ``[K // group_size, N]``, float.

``weight[n, k] = (code - zero_point) * scale`` of the group ``k // group_size``; nothing is added to
zero points, as GPTQ does. Sources: ``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py``
of AutoAWQ 0.2.9, ``nn_modules/qlinear/gemm_awq.py`` of GPTQModel 7.7.
"""

from __future__ import annotations

import torch

from ..w4a16_linear.packing import CODES_PER_WORD, GROUP_SIZES, MAX_CODE, pack_int4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight output channels each place holds, from the lowest bits up."""


def check_layout(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int
) -> None:
    """Raise ValueError unless the three tensors fit one another and ``group_size``. Reads no values."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} is not one of {list(GROUP_SIZES)}")
    if qweight.ndim != 2 or qweight.dtype != torch.int32:
        raise ValueError(
            f"qweight must be an int32 [K, N // 8], not {qweight.dtype} {list(qweight.shape)}"
        )
    inputs, words = qweight.shape
    if inputs == 0 or inputs % group_size:
        raise ValueError(f"K = {inputs} is not a positive multiple of group_size {group_size}")
    groups = inputs // group_size
    if list(qzeros.shape) != [groups, words] or qzeros.dtype != torch.int32:
        raise ValueError(
            f"qzeros must be an int32 {[groups, words]}, not {qzeros.dtype} {list(qzeros.shape)}"
        )
    outputs = words * CODES_PER_WORD
    if list(scales.shape) != [groups, outputs] or not scales.is_floating_point():
        raise ValueError(
            f"scales must be a float {[groups, outputs]}, not {scales.dtype} {list(scales.shape)}"
        )


def unpack(words: torch.Tensor) -> torch.Tensor:
    """``qweight`` or ``qzeros``, int32 ``[R, N // 8]``, to uint8 ``[R, N]`` in channel order."""
    found = torch.empty(*words.shape, CODES_PER_WORD, dtype=torch.uint8, device=words.device)
    for place, channel in enumerate(ORDER):
        found[..., channel] = ((words >> (4 * place)) & MAX_CODE).to(torch.uint8)
    return found.flatten(1)


def repack(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same codes, scales and zero points in our layout (:mod:`..w4a16_linear.packing`).

    Returns:
        ``qweight`` int32 ``[N, K // 8]``, ``scales`` ``[N, K // group_size]`` in their dtype and
        ``zero_points`` uint8 of that shape.

    Raises:
        ValueError: the tensors do not fit one another or ``group_size``.
    """
    check_layout(qweight, qzeros, scales, group_size)
    return (
        pack_int4(unpack(qweight).t().contiguous()),
        scales.t().contiguous(),
        unpack(qzeros).t().contiguous(),
    )
