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


class Digest:
    """Tells a picture's pixels from all others'; equal digests mean equal pixels, shape and note.

    Nothing is computed before :meth:`take` or the first comparison, and a GPU is waited for in
    comparisons only.

    Args:
        pixels: the picture; must not change before :meth:`take`.
        note: what else is part of its identity (grid, frame rate, …).
    """

    def __init__(self, pixels: torch.Tensor, note: str = "") -> None:
        self._pixels: torch.Tensor | None = pixels
        self._note = note
        self._sums: torch.Tensor | None = None
        self._value: bytes | None = None

    def add(self, note: str) -> None:
        """Make something else part of the identity; before :meth:`take` only."""
        assert self._pixels is not None
        self._note += note

    def take(self) -> None:
        """Read the pixels (on a GPU: start reading them) and forget them."""
        pixels, self._pixels = self._pixels, None
        if pixels is None:
            return
        described = f"{tuple(pixels.shape)} {pixels.dtype} {self._note}".encode()
        sha = hashlib.blake2b(described, digest_size=16)
        if pixels.device.type == "cpu":
            octets: Any = pixels.detach().contiguous().view(torch.uint8).numpy()
            sha.update(octets)
        else:
            self._sums = _sums(pixels)
        self._value = sha.digest()

    def value(self) -> bytes:
        """16 bytes or more."""
        self.take()
        assert self._value is not None
        if self._sums is not None:
            self._value += repr(self._sums.tolist()).encode()
            self._sums = None
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.value() == other.value()


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
