"""Identity of pixels: any change is noticed, on the CPU and in the sums that a GPU computes."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile import digest


@pytest.fixture(params=["hash", "sums"])
def identify(request: pytest.FixtureRequest) -> object:
    if request.param == "hash":
        return lambda x: digest.Digest(x).value()
    return lambda x: tuple(digest._sums(x).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 4095, 4097, 70000])
def test_any_change_is_noticed(identify: object, dtype: torch.dtype, count: int) -> None:
    assert callable(identify)
    torch.manual_seed(0)
    pixels = torch.randn(count).to(dtype)
    same = identify(pixels)
    assert identify(pixels.clone()) == same
    for at in {0, count // 2, count - 1}:
        other = pixels.clone()
        other[at] = -other[at]
        assert identify(other) != same, at
    if count > 1:
        assert identify(pixels.flip(0)) != same
        swapped = pixels.clone()
        swapped[[0, count - 1]] = pixels[[count - 1, 0]]
        assert identify(swapped) != same


def test_shape_grid_and_dtype_count() -> None:
    pixels = torch.zeros(4, 6)
    known = digest.Digest(pixels, "(1, 2, 2)")
    assert known == digest.Digest(pixels.clone(), "(1, 2, 2)")
    assert known != digest.Digest(pixels, "(1, 4, 1)")
    assert known != digest.Digest(pixels.view(6, 4), "(1, 2, 2)")
    assert known != digest.Digest(pixels.half(), "(1, 2, 2)")
    paced = digest.Digest(pixels, "(1, 2, 2)")
    paced.add("0.5")
    assert paced != known


def test_taken_pixels_may_change() -> None:
    pixels = torch.zeros(4, 6)
    before = digest.Digest(pixels)
    before.take()
    pixels += 1
    assert before == digest.Digest(torch.zeros(4, 6))
    assert before != digest.Digest(pixels)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1024, 1176, device="cuda")
    other = pixels.clone()
    other[500, 3] += 1
    first, second, third = (digest.Digest(p) for p in (pixels, other, pixels.clone()))
    digest._keys(pixels.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first == third
    assert first != second
