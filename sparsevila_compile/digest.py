"""Identity of pixels, so that a picture that a cache holds is known again.

On the CPU a cryptographic hash. On a GPU, where fetching the pixels would cost more than encoding
them, two keyed multilinear sums modulo 2^64 whose keys are drawn once a process: two different
pictures get the same pair with a chance below 2^-64.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from typing import Any

import torch

_FOLD = 4096
"""Words that one sum takes in."""


def digests(parts: list[torch.Tensor], notes: list[str]) -> list[bytes]:
    """16 bytes or more for each picture; ``notes`` (shape, grid, …) are part of its identity.

    Waits for a GPU once, however many pictures lie there.
    """
    sums = [None if p.device.type == "cpu" else _sums(p) for p in parts]
    there = [s for s in sums if s is not None]
    fetched = iter(torch.stack(there).tolist() if there else [])
    result = []
    for part, note, keyed in zip(parts, notes, sums, strict=True):
        digest = hashlib.blake2b(
            f"{tuple(part.shape)} {part.dtype} {note}".encode(), digest_size=16
        )
        if keyed is None:
            octets: Any = part.detach().contiguous().view(torch.uint8).numpy()
            digest.update(octets)
        else:
            digest.update(repr(next(fetched)).encode())
        result.append(digest.digest())
    return result


@functools.cache
def _keys(device: torch.device) -> torch.Tensor:
    words = [[secrets.randbits(63) * 2 + 1 - 2**63 for _ in range(_FOLD)] for _ in range(2)]
    return torch.tensor(words, device=device)


@torch.inference_mode()
def _sums(pixels: torch.Tensor) -> torch.Tensor:
    """int64 ``[2]`` on the pixels' device."""
    keys = _keys(pixels.device)
    flat = pixels.detach().contiguous().view(torch.uint8).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32)
    words = flat.expand(2, -1)
    while words.shape[1] > 1:
        padded = torch.nn.functional.pad(words, (0, -words.shape[1] % _FOLD))
        folded = (padded.reshape(2, -1, _FOLD) * keys[:, None]).sum(2)
        words = folded ^ (folded >> 29)  # high bits come down: sums alone never mix them
    return words[:, 0]
