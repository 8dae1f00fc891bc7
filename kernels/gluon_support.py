"""Gluon, Triton's language for kernels that place their own warps, shared memory and copies.

A kernel module takes these names from here. Where Triton has no Gluon (it is experimental, and
needs Triton 3.6) they stand for Triton itself or its placeholder, under which the module still
imports; :func:`hopper_only` says why its kernels cannot run. Triton's interpreter does not run Gluon.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch

from .triton_support import HAVE_TRITON, Reason, triton

_HOPPER = "triton.experimental.gluon.language.nvidia.hopper"


def _available() -> bool:
    try:
        return HAVE_TRITON and importlib.util.find_spec(_HOPPER) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


HAVE_GLUON = _available()

gluon: Any = triton
gl: Any = triton
mbarrier: Any = triton
tma: Any = triton
warpgroup_mma: Any = triton
warpgroup_mma_init: Any = triton
warpgroup_mma_wait: Any = triton
fence_async_shared: Any = triton
_TensorDescriptor: Any = None
if HAVE_GLUON:
    gluon = importlib.import_module("triton.experimental.gluon")
    gl = importlib.import_module("triton.experimental.gluon.language")
    _hopper = importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    mbarrier, tma = _hopper.mbarrier, _hopper.tma
    warpgroup_mma, warpgroup_mma_wait = _hopper.warpgroup_mma, _hopper.warpgroup_mma_wait
    warpgroup_mma_init = _hopper.warpgroup_mma_init
    fence_async_shared = _hopper.fence_async_shared
    _TensorDescriptor = importlib.import_module(
        "triton.experimental.gluon.nvidia.hopper"
    ).TensorDescriptor

_COPY_BYTES = 16
"""What the copy engine wants base addresses and strides to be multiples of."""


@functools.cache
def _no_gluon() -> str:
    """Said once: kernels for Hopper are two times as fast as those that stand in for them."""
    reason = "this Triton has no Gluon: install Triton 3.6 or newer for the kernels for Hopper"
    warnings.warn(reason, stacklevel=2)
    return reason


def hopper_only(device: torch.device) -> Reason:
    """Why a kernel for Hopper (compute capability 9) cannot run on this device, or None."""
    if device.type != "cuda":
        return f"needs a Hopper GPU, this is {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"needs a Hopper GPU, this is {torch.cuda.get_device_name(device)}"
    return None if HAVE_GLUON else _no_gluon()


def copyable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read blocks of this tensor: dense last dim, aligned strides."""
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % _COPY_BYTES == 0
        and tensor.stride(-1) == 1
        and all(
            length == 1 or (stride > 0 and stride * size % _COPY_BYTES == 0)
            for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
    )


@functools.cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The swizzled layout in shared memory of blocks of this shape."""
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).split(".")[1]))


@functools.cache
def plain_layout(block: tuple[int, ...], bits: int) -> Any:
    """The layout in shared memory of blocks that threads read row by row: no swizzle."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(block))


def descriptor(tensor: torch.Tensor, block: tuple[int, ...], *, plain: bool = False) -> Any:
    """What the copy engine reads blocks of ``tensor`` by; places outside the tensor read as zero.

    The blocks come in :func:`shared_layout`, or in :func:`plain_layout`.
    """
    strides = [
        _COPY_BYTES if length == 1 else stride  # of a dim of one: anything aligned
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ]
    if plain:
        layout = plain_layout(block, 8 * tensor.element_size())
    else:
        layout = shared_layout(block, tensor.dtype)
    return _TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], list(block), layout)
