"""What every Triton kernel of this package shares: the import, where it may run, small arithmetic.

A kernel module says ``from ..triton_support import tl, triton``. Where Triton is not installed both
names stand for a placeholder under which the module still imports and whose kernels refuse to run.

Kernels are written below ``@triton.jit`` and ``@no_type_check``: a type checker does not know
Triton's language.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, no_type_check

import torch

from .registry import Reason as Reason

HAVE_TRITON = importlib.util.find_spec("triton") is not None


class _Missing:
    """Stands for Triton where it is not installed: decorates and calls, but never launches."""

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):  # not to be taken for an array, an iterator, ...
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Missing:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("triton is not installed: this kernel cannot be launched")


triton: Any = _Missing()
tl: Any = triton
if HAVE_TRITON:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

# Whether kernels are interpreted is settled when they are decorated, so it is read once, here.
_INTERPRETING = HAVE_TRITON and bool(triton.knobs.runtime.interpret)

_MIN_CAPABILITY = (8, 0)
"""Ampere: the first generation with bfloat16 and asynchronous copies."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before Triton's import)."""
    return _INTERPRETING


def needs_cuda(device: torch.device) -> Reason:
    """``supported`` of a Triton implementation.

    The interpreter does not count: it is a testing aid some 10,000 times slower than the reference,
    which the lowering pass must never choose by itself. A test names ``impl="triton"`` instead.
    """
    if not HAVE_TRITON:
        return "triton is not installed"
    if device.type != "cuda":
        return f"needs CUDA, this is {device.type}"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return (
                f"needs compute capability {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}, "
                f"this GPU has {capability[0]}.{capability[1]}"
            )
    return None


def cuda_or_interpreter(device: torch.device) -> Reason:
    """Why kernels cannot be launched on tensors of this device right now, or None.

    For tests and for :func:`check_launch`; ``supported=`` takes :func:`needs_cuda`.
    """
    if HAVE_TRITON and device.type == "cpu":
        return None if _INTERPRETING else "needs CUDA or TRITON_INTERPRET=1, this is cpu"
    return needs_cuda(device)


_LAUNCHED: set[torch.device] = set()
"""Devices that a launch was allowed on: to ask again costs more than the rest of a launch's checks."""


def check_launch(op: str, tensor: torch.Tensor) -> None:
    """Refuse a launch on a device that cannot run it: clearer than what Triton itself would say."""
    if tensor.device in _LAUNCHED:
        return
    reason = cuda_or_interpreter(tensor.device)
    if reason is not None:
        raise RuntimeError(f"{op}/triton: {reason}")
    if tensor.device.type == "cuda":
        _LAUNCHED.add(tensor.device)


_NO_GUARD: AbstractContextManager[Any] = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Around a launch: Triton launches on the current CUDA device, not on that of the tensors."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _NO_GUARD
    guard: AbstractContextManager[Any] = torch.cuda.device(tensor.device)  # type: ignore[no-untyped-call]
    return guard


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for non-negative ``a`` and positive ``b``."""
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 operands keep all their bits, never TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


_INTERPRETED = tl.constexpr(_INTERPRETING)


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32, a cast to b's dtype; use this and not ``tl.dot``.

    Triton's interpreter (3.6, 3.7) multiplies the bit patterns of bfloat16, and truncates where a
    GPU rounds when it casts to it: there both operands are widened, which loses nothing.
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device: what a split of long rows is sized by.

    In the interpreter 4, so that small tests exercise more than one split.
    """
    return 4 if device.type != "cuda" else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
