"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A decode step is a chain of hundreds of short kernels, and each waits about a microsecond for the
one before to drain. From Hopper on, a kernel may be launched early, prepare itself, and wait for
its predecessor's results only then. A kernel that takes part

- is launched with the options of :func:`launch_options`, whose ``EARLY`` is one of its constants;
- calls :func:`begin` first, which lets its successor start in the same way;
- calls :func:`wait` before it touches memory that any other kernel writes **or reads and it
  writes**: only constants of the model (weights, norms) may be read before, and nothing written.

Every program of the kernel must reach ``wait``. A successor that does not take part starts when
the kernel is complete, as ever.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch

from .triton_support import interpreting, tl, triton

_HOPPER = (9, 0)
_CAPABLE: dict[int, bool] = {}


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on that device: the constant ``EARLY``, and what it needs."""
    if interpreting() or device.type != "cuda":
        return {"EARLY": False}
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _CAPABLE:
        _CAPABLE[index] = torch.cuda.get_device_capability(index) >= _HOPPER
    return {"EARLY": True, "launch_pdl": True} if _CAPABLE[index] else {"EARLY": False}


@triton.jit
@no_type_check
def begin(EARLY: tl.constexpr):
    """Let the successor start."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
@no_type_check
def wait(EARLY: tl.constexpr):
    """Wait until all that the predecessors wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
