"""Triton kernels of ``w8a8_linear``: one rounds the tokens, one multiplies and rescales.

Rounding reads x once and leaves a quarter to a half of its bytes for the product to read. Sums go
along K in one order in one program: results do not vary from run to run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import gcd
from typing import Any, no_type_check

import torch

from ..triton_support import (
    HAVE_TRITON,
    Reason,
    cdiv,
    check_launch,
    interpreting,
    next_power_of_2,
    on_device,
    processors,
    tl,
    triton,
)
from .reference import ACTIVATION_DTYPES, check_args
from .rounding import ALIGNMENT, FLOOR, LARGEST, padded

_INTERPRETED = tl.constexpr(interpreting())
_FLOOR = tl.constexpr(FLOOR)
_FLOAT8_CAPABILITY = (8, 9)

_Descriptor: Any = None
if HAVE_TRITON:
    _Descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


@triton.jit
@no_type_check
def _whole(y):
    """y rounded to integers, halves to even; less than 2^22 in size.

    The sum has no bits left for a fraction, and its low bits are the integer in two's complement:
    no float-to-integer conversion, which runs at a quarter of the rate.
    """
    return y + 12582912.0  # 1.5 * 2^23


@triton.jit
@no_type_check
def _to_float8(y):
    """y as float8e4nv, rounded to nearest, halves to even; the interpreter's own cast truncates."""
    if _INTERPRETED:
        exponent = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # 2^-6: subnormal
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        y = (_whole(y / step) - 12582912.0) * step
    return y.to(tl.float8e4nv)


@triton.jit
@no_type_check
def _code(y, FLOAT8: tl.constexpr):
    """y rounded to 8 bits."""
    if FLOAT8:
        code = _to_float8(y)
    else:
        code = _whole(y).to(tl.int32, bitcast=True).to(tl.int8)
    return code


@triton.jit
@no_type_check
def _bits(value):
    """As integers, the bits of floats without sign are in the floats' order, NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
@no_type_check
def _round_rows(
    x,  # [M, K], rows stride_xm apart
    codes,  # [M, WIDTH]
    scales,  # float32 [M]
    K,
    WIDTH,
    stride_xm,
    LARGEST: tl.constexpr,
    FLOAT8: tl.constexpr,
    ALIGNED: tl.constexpr,  # divides K and stride_xm
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # BLOCK + REST >= WIDTH
):
    """One program: one row, held in registers, in two pieces so that few lanes idle."""
    m = tl.program_id(0).to(tl.int64)
    x += m * (stride_xm // ALIGNED * ALIGNED)
    codes += m * WIDTH
    K = K // ALIGNED * ALIGNED  # says how wide loads may be
    k = tl.arange(0, BLOCK)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    amax = tl.max(_bits(value), 0)
    if REST:
        j = BLOCK + tl.arange(0, REST)
        tail = tl.load(x + j, mask=j < K, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(_bits(tail), 0))
    amax = amax.to(tl.float32, bitcast=True)
    finite = amax < float("inf")
    amax = tl.where(amax < _FLOOR, _FLOOR, amax)
    inverse = tl.where(finite, tl.div_rn(LARGEST, amax), 0.0)
    tl.store(scales + m, tl.where(finite, tl.div_rn(amax, LARGEST), float("nan")))
    tl.store(codes + k, _code(value * inverse, FLOAT8), mask=k < WIDTH)
    if REST:
        tl.store(codes + j, _code(tail * inverse, FLOAT8), mask=j < WIDTH)


@triton.jit
@no_type_check
def _tile(
    tile,
    a,
    b,
    c,
    token_scales,
    scales,
    bias,
    M,
    N,
    K,
    FLOAT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A BLOCK_M x BLOCK_N tile of the output over all of K; arguments are those of _multiply."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    top = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - top, GROUP)
    first_m = (top + tile % (GROUP * tiles_n) % height) * BLOCK_M
    first_n = (tile % (GROUP * tiles_n) // height) * BLOCK_N
    KIND: tl.constexpr = tl.float32 if FLOAT8 else tl.int32
    acc = tl.zeros((BLOCK_M, BLOCK_N), KIND)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([first_m, k]), b.load([first_n, k]).T, acc, out_dtype=KIND)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    token_scale = tl.load(token_scales + m, mask=m < M, other=0.0)
    scale = tl.load(scales + n, mask=n < N, other=0.0)
    result = acc.to(tl.float32) * token_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if BULK:
        c.store([first_m, first_n], result.to(c.dtype))
    else:
        N = N // ALIGNED * ALIGNED  # says how wide stores may be
        at = c + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, result.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
@no_type_check
def _multiply(
    a,  # descriptor of codes [M, K], blocks [BLOCK_M, BLOCK_K]
    b,  # descriptor of the weight [N, K], blocks [BLOCK_N, BLOCK_K]
    c,  # descriptor of out, blocks [BLOCK_M, BLOCK_N], or out
    token_scales,  # float32 [M]
    scales,  # float32 [N]
    bias,  # [N] or unused
    M,
    N,
    K,
    FLOAT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK: tl.constexpr,  # c is a descriptor
    ALIGNED: tl.constexpr,  # divides N
    PROGRAMS: tl.constexpr,  # that share the tiles; 0: one for each tile
    GROUP: tl.constexpr,  # rows of tiles that neighbouring programs work on
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: one tile, or every PROGRAMS-th, the next one's loads ahead of the last's end."""
    # fmt: off
    if PROGRAMS:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            _tile(tile, a, b, c, token_scales, scales, bias, M, N, K,
                  FLOAT8, HAS_BIAS, BULK, ALIGNED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        _tile(tl.program_id(0), a, b, c, token_scales, scales, bias, M, N, K,
              FLOAT8, HAS_BIAS, BULK, ALIGNED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    # fmt: on


def float8_missing(device: torch.device) -> Reason:
    """Why a CUDA device cannot multiply float8, or None; other devices compute it in float32."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _FLOAT8_CAPABILITY:
        return None
    return f"needs a GPU of compute capability 8.9 or later, this one has {capability[0]}.{capability[1]}"


def supports_args(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Reason:
    """Why these arguments cannot be taken, or None. Looks at dtypes and the device only."""
    if x.dtype not in ACTIVATION_DTYPES:
        return f"x is {x.dtype}"
    if bias is not None and bias.dtype not in ACTIVATION_DTYPES:
        return f"bias is {bias.dtype}"
    return None if weight.dtype == torch.int8 else float8_missing(x.device)


def round_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.rounding.quantize_rows`, of a matrix ``[M, K]``."""
    rows, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    wide = padded(width)
    codes = torch.empty((rows, wide), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(wide + 1) // 2
    rest = next_power_of_2(wide - block) if wide > block else 0
    with on_device(x):
        _round_rows[(rows,)](
            x,
            codes,
            scales,
            width,
            wide,
            x.stride(0),
            LARGEST=LARGEST[dtype],
            FLOAT8=dtype != torch.int8,
            ALIGNED=gcd(width, x.stride(0), ALIGNMENT),
            BLOCK=block,
            REST=rest,
            num_warps=min(16, max(1, block // 1024)),
        )
    return codes, scales


@dataclass(frozen=True)
class _Blocks:
    """How the product is cut; ``shared``: programs that share the tiles, 0 for one a tile."""

    m: int
    n: int
    k: int
    num_stages: int
    num_warps: int
    shared: int = 0


def _blocks(rows: int, code: torch.dtype, out: torch.Tensor) -> _Blocks:
    """Measured on an H200: shared tiles of float8 hide an output's way behind the next product.

    Two programs of int8 on one processor do as well, and their sums convert in fewer registers.
    """
    if interpreting():
        return _Blocks(16, 32, 64, 1, 4, shared=3 if code != torch.int8 else 0)
    if rows <= 64:
        return _Blocks(64, 32, 128, 5, 4)
    if out.element_size() == 2 and code != torch.int8 and rows > 256:
        return _Blocks(128, 256, 128, 3, 8, shared=processors(out.device))
    return _Blocks(128, 128, 128, 3, 4)


def w8a8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As :func:`.reference.w8a8_linear`, on CUDA or in Triton's interpreter.

    Sums of float8 products have the matrix units' precision: on an H200 they are off by 0.07 %
    (K = 1280) to 0.35 % (K = 18944) of the outputs' size, a tenth of what rounding to float8 costs.

    Raises:
        ValueError: the arguments do not fit one another.
        RuntimeError: the tensors' device cannot run Triton kernels.
    """
    check_args(x, weight, scales, bias)
    check_launch("w8a8_linear", x)
    outputs, width = weight.shape
    rows = x.numel() // max(x.shape[-1], 1)
    # The interpreter truncates where a GPU rounds to bfloat16: there PyTorch does the rounding.
    out_dtype = torch.float32 if interpreting() else x.dtype
    out = torch.empty((rows, outputs), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out.to(x.dtype).view(*x.shape[:-1], outputs)
    codes, token_scales = round_rows(x.reshape(rows, x.shape[-1]), weight.dtype)
    blocks = _blocks(rows, weight.dtype, out)
    bulk = outputs * out.element_size() % ALIGNMENT == 0
    weight = weight.contiguous()
    tiles = cdiv(rows, blocks.m) * cdiv(outputs, blocks.n)
    with on_device(x):
        _multiply[(min(tiles, blocks.shared or tiles),)](
            _Descriptor(codes, [rows, width], [width, 1], [blocks.m, blocks.k]),
            _Descriptor(weight, [outputs, width], [width, 1], [blocks.n, blocks.k]),
            _Descriptor(out, [rows, outputs], [outputs, 1], [blocks.m, blocks.n]) if bulk else out,
            token_scales,
            scales.contiguous(),
            token_scales if bias is None else bias.contiguous(),
            rows,
            outputs,
            width,
            FLOAT8=weight.dtype != torch.int8,
            HAS_BIAS=bias is not None,
            BULK=bulk,
            ALIGNED=gcd(outputs, ALIGNMENT),
            PROGRAMS=blocks.shared,
            GROUP=8,
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_K=blocks.k,
            num_stages=blocks.num_stages,
            num_warps=blocks.num_warps,
        )
    return out.to(x.dtype).view(*x.shape[:-1], outputs)
