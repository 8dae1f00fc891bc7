"""The storage layout of 4-bit groupwise weights: the only module that knows it.

A weight ``[N, K]`` is stored as three tensors:

- ``qweight`` int32 ``[N, K // 8]``: bits ``4 i .. 4 i + 3`` of word ``j`` are the code (0..15) of
  input channel ``8 j + i``. Read as bytes this is ``[N, K // 2]`` with the lower nibble first.
- ``scales`` ``[N, K // group_size]``, any float dtype.
- ``zero_points`` uint8 ``[N, K // group_size]``, 0..15.

Channel ``k`` belongs to group ``k // group_size``; ``weight = (code - zero_point) * scale``.
"""

from __future__ import annotations

import sys

import torch

GROUP_SIZES = (32, 64, 128)
"""Input channels that may share one scale and one zero point."""

MAX_CODE = 15
"""The largest 4-bit code and zero point; the smallest is 0."""

CODES_PER_WORD = 8

# Words are read and written as bytes, several times faster than shifting int32.
if sys.byteorder != "little":
    raise ImportError("4-bit weights are laid out for little-endian machines, this one is not")


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[N, K]`` of any integer dtype, 0..15, to ``qweight`` int32 ``[N, K // 8]``.

    Raises:
        ValueError: not an integer matrix, K is not a positive multiple of 8, or a code is out of range.
    """
    if codes.ndim != 2 or codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be an integer [N, K], not {codes.dtype} {list(codes.shape)}")
    if codes.shape[1] == 0 or codes.shape[1] % CODES_PER_WORD:
        raise ValueError(f"K = {codes.shape[1]} is not a positive multiple of {CODES_PER_WORD}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > MAX_CODE):
        raise ValueError(f"codes must lie in 0..{MAX_CODE}")
    narrow = codes.to(torch.uint8)
    return (narrow[:, 0::2] | (narrow[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack_int4(qweight: torch.Tensor) -> torch.Tensor:
    """``qweight`` int32 ``[N, K // 8]`` to its codes, uint8 ``[N, K]``.

    Raises:
        ValueError: not an int32 matrix.
    """
    _check_qweight(qweight)
    pairs = qweight.contiguous().view(torch.uint8)
    return torch.stack((pairs & MAX_CODE, pairs >> 4), dim=-1).flatten(1)


def dequantize_codes(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Unpacked codes ``[N, K]`` to the weight they stand for, float32 ``[N, K]``."""
    grouped = codes.reshape(codes.shape[0], -1, group_size).to(torch.float32)
    grouped -= zero_points[..., None]
    grouped *= scales[..., None].float()
    return grouped.flatten(1)


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, group_size: int
) -> torch.Tensor:
    """The weight float32 ``[N, K]`` that the stored tensors stand for.

    Raises:
        ValueError: shapes, dtypes or ``group_size`` do not fit one another.
    """
    check_layout(qweight, scales, zero_points, group_size)
    return dequantize_codes(unpack_int4(qweight), scales, zero_points, group_size)


def _check_qweight(qweight: torch.Tensor) -> None:
    if qweight.ndim != 2 or qweight.dtype != torch.int32:
        raise ValueError(
            f"qweight must be an int32 [N, K // 8], not {qweight.dtype} {list(qweight.shape)}"
        )


def check_layout(
    qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, group_size: int
) -> None:
    """Raise ValueError unless the three stored tensors fit one another and ``group_size``."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} is not one of {list(GROUP_SIZES)}")
    _check_qweight(qweight)
    rows, channels = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
    if channels == 0 or channels % group_size:
        raise ValueError(f"K = {channels} is not a positive multiple of group_size {group_size}")
    groups = [rows, channels // group_size]
    if list(scales.shape) != groups or not scales.is_floating_point():
        raise ValueError(
            f"scales must be a float {groups}, not {scales.dtype} {list(scales.shape)}"
        )
    if list(zero_points.shape) != groups or zero_points.dtype != torch.uint8:
        raise ValueError(
            f"zero_points must be a uint8 {groups}, not {zero_points.dtype} "
            f"{list(zero_points.shape)}"
        )
