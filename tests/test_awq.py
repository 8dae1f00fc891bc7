"""AWQ's tensor functions, judged by outputs computed directly from the calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila_compile import awq
from sparsevila_compile.awq import (
    SHRINKS,
    ActivationStats,
    AwqResult,
    Quantized,
    check_width,
    quantize_awq,
    quantize_groupwise,
    search_clip,
    search_scale,
)
from sparsevila_compile.errors import UserError
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import GROUP_SIZES, dequantize, pack_int4

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def tokens(count: int, channels: int, seed: int = 0, *, outliers: float = 20.0) -> torch.Tensor:
    """Activations as transformers have them: correlated, with an offset, a few channels large.

    The structure does not depend on the seed, so another seed gives held-out tokens.
    """
    fixed = generator(1234)
    mixing = torch.randn(channels // 8, channels, generator=fixed) / (channels // 8) ** 0.5
    offset = 0.3 * torch.randn(channels, generator=fixed)
    size = torch.ones(channels)
    size[::37] = outliers
    fresh = generator(seed)
    x = torch.randn(count, channels // 8, generator=fresh) @ mixing
    return (x + 0.3 * torch.randn(count, channels, generator=fresh) + offset) * size


def gaussian(outputs: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, channels, generator=generator(seed)) * 0.02


def heavy_tailed(outputs: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Student's t with three degrees of freedom, as a ratio of normals: rare large weights."""
    g = generator(seed)
    square = torch.randn(3, outputs, channels, generator=g).square().mean(0)
    return 0.02 * torch.randn(outputs, channels, generator=g) / square.sqrt()


def stats_of(*batches: torch.Tensor) -> ActivationStats:
    stats = ActivationStats(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        stats.update(batch)
    return stats


def direct_error(approximate: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Mean over tokens of the squared output error, from the tokens themselves, in float64."""
    left = (approximate.double() - weight.double()) @ x.double().T
    return float(left.square().sum() / x.shape[0])


def effective(result: AwqResult, index: int = 0) -> torch.Tensor:
    return result.quantized[index].dequantize() / result.scale


# ---- round to nearest


@settings(max_examples=60, deadline=None)
@given(
    group_size=st.sampled_from(GROUP_SIZES),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_rounding_is_within_half_a_step(
    group_size: int,
    scale_dtype: torch.dtype,
    rows: int,
    groups: int,
    size: float,
    shift: float,
    seed: int,
) -> None:
    weight = size * (shift + torch.randn(rows, groups * group_size, generator=generator(seed)))
    quantized = quantize_groupwise(weight, group_size, scale_dtype=scale_dtype)
    codes, scales, zero_points = quantized
    assert codes.shape == weight.shape
    assert scales.shape == zero_points.shape == (rows, groups)
    assert (codes.dtype, scales.dtype, zero_points.dtype) == (torch.uint8, scale_dtype, torch.uint8)
    assert int(codes.max()) <= 15
    assert int(zero_points.max()) <= 15
    # Half a step of rounding, half a step at the ends where the zero point was rounded, and what
    # rounding the scale to its dtype takes off 15 steps.
    slack = 1.0 + 15 * torch.finfo(scale_dtype).eps
    step = scales.float().repeat_interleave(group_size, 1)
    assert bool(((quantized.dequantize() - weight).abs() <= slack * step).all())
    # Inside the range it is half a step: most values are.
    inside = ((quantized.dequantize() - weight).abs() <= 0.5001 * step).float().mean()
    assert float(inside) >= 0.9


def test_what_is_stored_is_what_was_rounded() -> None:
    """Codes fit the stored scale, not the exact one: scales a half unit off would show."""
    weight = gaussian(64, 256)
    quantized = quantize_groupwise(weight, 64, scale_dtype=torch.bfloat16)
    stored = quantized.scales.float().repeat_interleave(64, 1)
    zero = quantized.zero_points.float().repeat_interleave(64, 1)
    expected = ((weight / stored).round() + zero).clamp(0, 15)
    assert torch.equal(quantized.codes.float(), expected)
    grouped = weight.view(64, 4, 64)
    exact = (grouped.amax(-1) - grouped.amin(-1)) / 15
    assert not torch.equal(exact, quantized.scales.float())
    from_exact = ((weight / exact.repeat_interleave(64, 1)).round() + zero).clamp(0, 15)
    assert not torch.equal(quantized.codes.float(), from_exact)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_exact_zeros_and_representable_weights(scale_dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 64)
    weight[1, :32] = torch.arange(32) % 16 * 0.25 - 1.0
    weight[2, 5] = 3.0
    quantized = quantize_groupwise(weight, 32, scale_dtype=scale_dtype)
    assert torch.equal(quantized.dequantize()[:2], weight[:2])
    assert torch.equal(quantized.dequantize()[2] == 0, weight[2] == 0)
    assert float(quantized.dequantize()[2, 5]) == pytest.approx(3.0, rel=5e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign(sign: float) -> None:
    """The range holds zero, so a group far from it keeps its values."""
    weight = sign * (5 + torch.rand(4, 64, generator=generator(0)))
    error = (quantize_groupwise(weight, 32).dequantize() - weight).abs()
    assert float(error.max()) <= 6 / 15


def test_quantizing_the_quantized_changes_nothing() -> None:
    once = quantize_groupwise(gaussian(16, 128), 32, scale_dtype=torch.float32)
    again = quantize_groupwise(once.dequantize(), 32, scale_dtype=torch.float32)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-5, atol=0)


def test_weights_of_any_float_dtype() -> None:
    weight = gaussian(16, 128).bfloat16()
    wide = quantize_groupwise(weight.float(), 32)
    for narrow, same in zip(quantize_groupwise(weight, 32), wide, strict=True):
        assert torch.equal(narrow, same)


def test_smaller_groups_and_no_shrink_are_better() -> None:
    weight = gaussian(64, 512)
    x = torch.eye(512)
    errors = [
        direct_error(quantize_groupwise(weight, size).dequantize(), weight, x)
        for size in GROUP_SIZES
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]
    halved = quantize_groupwise(weight, 32, shrink=0.5).dequantize()
    assert float(halved.max()) < 0.6 * float(weight.max())


# ---- refusals


@pytest.mark.parametrize(
    ("width", "group_size", "match"),
    [
        (96, 64, r"layer\.0: its width 96 is not divisible by group_size 64; use group_size 32,"),
        (100, 128, r"width 100 is not divisible by group_size 128; leave it unquantized"),
        (128, 16, r"group_size 16: choose one of \[32, 64, 128\]"),
        (0, 32, "width 0"),
    ],
)
def test_width_refused(width: int, group_size: int, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        check_width(width, group_size, "layer.0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, s: quantize_groupwise(w, 64),
        lambda w, s: search_scale([w], s, 64),
        lambda w, s: search_clip(w, s, 64),
        lambda w, s: quantize_awq([w], s, 64),
    ],
    ids=["quantize_groupwise", "search_scale", "search_clip", "quantize_awq"],
)
def test_every_function_refuses_bad_weights(function: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="width 96 is not divisible"):
        function(gaussian(4, 96), stats_of(tokens(8, 96)))
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = gaussian(4, 128)
        broken[1, 2] = value
        with pytest.raises(UserError, match="inf or NaN"):
            function(broken, stats_of(tokens(8, 128)))


@pytest.mark.parametrize(
    "function",
    [search_scale, quantize_awq, lambda w, s, g: search_clip(w[0], s, g)],
    ids=["search_scale", "quantize_awq", "search_clip"],
)
def test_every_search_refuses_bad_data(function: Callable[..., Any]) -> None:
    weights = [gaussian(4, 128)]
    with pytest.raises(UserError, match="no tokens"):
        function(weights, ActivationStats(128), 64)
    x = tokens(8, 128)
    x[3, 4] = float("inf")
    with pytest.raises(UserError, match="inf or NaN"):
        function(weights, stats_of(x), 64)


def test_overflow_is_refused() -> None:
    weight = 1e6 * gaussian(4, 128) / 0.02
    with pytest.raises(UserError, match="float16"):
        quantize_groupwise(weight, 32, scale_dtype=torch.float16)
    with pytest.raises(UserError, match="float16"):
        quantize_awq([weight], stats_of(tokens(8, 128)), 32, scale_dtype=torch.float16)
    quantize_awq([weight], stats_of(tokens(8, 128)), 32, grid=2)


def test_misuse_is_refused() -> None:
    weight, stats = gaussian(4, 128), stats_of(tokens(8, 128))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 128\]"):
        stats.update(tokens(8, 64))
    with pytest.raises(ValueError, match="grid"):
        search_scale([weight], stats, 32, grid=0)
    with pytest.raises(ValueError, match="2 values of clip"):
        quantize_awq([weight], stats, 32, clip=[True, False])
    with pytest.raises(ValueError, match="ones unchanged"):
        search_scale([weight], stats, 32, applied=lambda scale: 2 * scale)
    with pytest.raises(ValueError, match="positive, finite"):
        search_scale([weight], stats, 32, applied=lambda scale: scale - 1)


# ---- statistics


def test_stats_against_the_tokens() -> None:
    x = tokens(70, 64).view(7, 10, 64)
    stats = stats_of(x[:2], x[2:3].bfloat16().float(), x[3:])
    flat = torch.cat([x[:2], x[2:3].bfloat16().float(), x[3:]]).reshape(-1, 64).double()
    assert stats.tokens == 70
    torch.testing.assert_close(stats.mean_abs().double(), flat.abs().mean(0), rtol=1e-6, atol=0)
    rows = gaussian(5, 64)
    expected = (flat @ rows.double().T).square().mean(0)
    torch.testing.assert_close(stats.squared_norm(rows), expected, rtol=1e-5, atol=0)


def test_stats_take_any_float_dtype_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(50, 64).bfloat16()
    whole = stats_of(x)
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", 1500 * 7)
    chunked = stats_of(x)
    assert chunked.tokens == whole.tokens == 50
    torch.testing.assert_close(chunked.gram, whole.gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(chunked.abs_sum, whole.abs_sum)


# ---- the search


def test_awq_beats_rounding_where_channels_stand_out() -> None:
    """Channels 20 times the others: at most half the error, on held-out tokens as well."""
    weights = [gaussian(96, 512, seed=1), gaussian(32, 512, seed=2)]
    x, held_out = tokens(2048, 512, seed=0), tokens(2048, 512, seed=1)
    for group_size in GROUP_SIZES:
        plain = [quantize_groupwise(w, group_size).dequantize() for w in weights]
        result = quantize_awq(weights, stats_of(x), group_size, clip=False)
        assert result.choice.alpha > 0
        assert result.clipped == 0
        for data in (x, held_out):
            rtn = sum(direct_error(p, w, data) for p, w in zip(plain, weights, strict=True))
            chosen = sum(direct_error(effective(result, i), weights[i], data) for i in range(2))
            assert rtn > 0
            assert chosen < 0.5 * rtn
        clipped = quantize_awq(weights, stats_of(x), group_size)
        assert clipped.error_awq < 0.9 * result.error_awq


def test_reported_errors_are_the_real_ones() -> None:
    weights = [heavy_tailed(40, 256), gaussian(24, 256)]
    x = tokens(500, 256)
    result = quantize_awq(weights, stats_of(x[:200], x[200:]), 64)
    rtn = sum(direct_error(quantize_groupwise(w, 64).dequantize(), w, x) for w in weights)
    chosen = sum(direct_error(effective(result, i), w, x) for i, w in enumerate(weights))
    power = sum(direct_error(torch.zeros_like(w), w, x) for w in weights)
    assert result.error_rtn == pytest.approx(rtn, rel=1e-4)
    assert result.error_awq == pytest.approx(chosen, rel=1e-4)
    assert result.output_power == pytest.approx(power, rel=1e-4)
    assert 0 < result.error_awq < result.error_rtn < 0.1 * power


@settings(max_examples=40, deadline=None)
@given(
    group_size=st.sampled_from(GROUP_SIZES),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    outliers=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    count=st.sampled_from([1, 5, 200]),
    heavy=st.booleans(),
    clip=st.booleans(),
    duo=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_never_worse_than_rounding(
    group_size: int,
    scale_dtype: torch.dtype,
    outliers: float,
    count: int,
    heavy: bool,
    clip: bool,
    duo: bool,
    seed: int,
) -> None:
    x = tokens(count, 256, seed, outliers=outliers)
    weight = (heavy_tailed if heavy else gaussian)(7, 256, seed)
    result = quantize_awq(
        [weight], stats_of(x), group_size, clip, grid=5, duo=duo, scale_dtype=scale_dtype
    )
    assert 0 <= result.error_awq <= result.choice.error <= result.error_rtn
    assert bool((result.scale > 0).all())
    plain = quantize_groupwise(weight, group_size, scale_dtype=scale_dtype).dequantize()
    rtn = direct_error(plain, weight, x)
    # Errors come from a float32 second moment: equal up to its rounding.
    rounding = 1e-6 * direct_error(torch.zeros_like(weight), weight, x)
    assert direct_error(effective(result), weight, x) <= rtn * (1 + 1e-4) + rounding


def test_scale_search_tries_rounding_first() -> None:
    """With nothing to gain, plain rounding is kept: representable weights, and a grid of one."""
    weight = (torch.arange(128) % 16 * 0.25 - 1.0).repeat(4, 1)
    choice = search_scale([weight], stats_of(tokens(64, 128)), 32)
    assert bool((choice.scale == 1).all())
    assert choice.error == choice.error_rtn == 0
    only = search_scale([gaussian(4, 128)], stats_of(tokens(64, 128)), 32, grid=1, duo=False)
    assert bool((only.scale == 1).all())
    assert only.error == only.error_rtn > 0


def test_finer_grid_and_duo_are_never_worse() -> None:
    weights, stats = [gaussian(32, 256)], stats_of(tokens(300, 256))
    coarse = search_scale(weights, stats, 64, grid=5, duo=False)
    fine = search_scale(weights, stats, 64, grid=20, duo=False)
    both = search_scale(weights, stats, 64, grid=20, duo=True)
    assert both.error <= fine.error <= coarse.error < coarse.error_rtn


def test_duo_helps_where_weights_stand_out() -> None:
    """Weight columns of different sizes, even activations: at most half of what alpha alone leaves."""
    columns = torch.exp(torch.randn(256, generator=generator(3)))
    weights, stats = [gaussian(32, 256) * columns], stats_of(tokens(300, 256, outliers=1.0))
    for group_size in GROUP_SIZES:
        plain = search_scale(weights, stats, group_size, duo=False)
        duo = search_scale(weights, stats, group_size, duo=True)
        assert duo.duo
        assert not plain.duo
        assert duo.error < 0.5 * plain.error


def test_scale_is_the_one_applied() -> None:
    """Codes and errors belong to the scale the network will use, here powers of two."""

    def power_of_two(scale: torch.Tensor) -> torch.Tensor:
        return torch.exp2(scale.log2().round())

    weight, x = gaussian(32, 256), tokens(300, 256)
    result = quantize_awq([weight], stats_of(x), 64, clip=False, applied=power_of_two)
    assert torch.equal(result.scale, power_of_two(result.scale))
    assert not bool((result.scale == 1).all())
    expected = quantize_groupwise(weight * result.scale, 64)
    assert torch.equal(result.quantized[0].codes, expected.codes)
    assert result.error_awq == pytest.approx(direct_error(effective(result), weight, x), rel=1e-4)
    assert result.error_awq < 0.7 * result.error_rtn
    default = search_scale([weight], stats_of(x), 64, scale_dtype=torch.bfloat16)
    assert torch.equal(default.scale, default.scale.bfloat16().float())


def test_inactive_channels() -> None:
    """Channels that calibration never used, and inputs that are all zero, break nothing."""
    x = tokens(100, 128)
    x[:, :40] = 0
    result = quantize_awq([gaussian(8, 128)], stats_of(x), 32)
    assert bool(result.scale.isfinite().all())
    assert result.error_awq < result.error_rtn
    silent = quantize_awq([gaussian(8, 128)], stats_of(torch.zeros(5, 128)), 32)
    assert silent.error_awq == silent.error_rtn == 0
    assert bool((silent.scale == 1).all())


# ---- clipping


def test_clipping_helps_heavy_tails() -> None:
    """At most 85 % of the error is left, on held-out tokens as well, and no row gets worse."""
    weight = heavy_tailed(64, 512)
    x, held_out = (tokens(2048, 512, seed, outliers=1.0) for seed in (0, 1))
    for group_size in GROUP_SIZES:
        shrink = search_clip(weight, stats_of(x), group_size)
        assert shrink.shape == (64, 512 // group_size)
        allowed = torch.tensor(SHRINKS)
        assert bool(torch.isin(shrink, allowed).all())
        assert 0 < float((shrink < 1).float().mean()) < 1
        plain = quantize_groupwise(weight, group_size).dequantize()
        clipped = quantize_groupwise(weight, group_size, shrink=shrink).dequantize()
        for data in (x, held_out):
            assert direct_error(clipped, weight, data) < 0.85 * direct_error(plain, weight, data)
        before = ((plain - weight).double() @ x.double().T).square().sum(1)
        after = ((clipped - weight).double() @ x.double().T).square().sum(1)
        assert bool((after <= before * (1 + 1e-4)).all())


def clip_by_trying(weight: torch.Tensor, x: torch.Tensor, group_size: int) -> torch.Tensor:
    """What search_clip promises, slowly: float64, from the tokens, nothing updated in place."""

    def difference(shrink: torch.Tensor) -> torch.Tensor:
        return quantize_groupwise(weight, group_size, shrink=shrink).dequantize().double() - weight

    def errors(left: torch.Tensor) -> torch.Tensor:
        return (left @ x.double().T).square().sum(1)

    rows, groups = weight.shape[0], weight.shape[1] // group_size
    plain = torch.ones(rows, groups)
    shrink = plain.clone()
    for alone in (True, False):
        for group in range(groups):
            tried = []
            for ratio in SHRINKS:
                candidate = shrink.clone()
                candidate[:, group] = ratio
                left = difference(candidate)
                if alone:
                    outside = torch.arange(weight.shape[1]) // group_size != group
                    left[:, outside] = 0
                tried.append(errors(left))
            shrink[:, group] = torch.tensor(SHRINKS)[torch.stack(tried).min(0).indices]
    worse = errors(difference(shrink)) >= errors(difference(plain))
    return torch.where(worse[:, None], plain, shrink)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_clipping_against_trying_everything(
    make: Callable[[int, int, int], torch.Tensor],
) -> None:
    for seed in range(4):
        weight, x = make(12, 128, seed), tokens(90, 128, seed, outliers=1.0)
        found, expected = search_clip(weight, stats_of(x), 32), clip_by_trying(weight, x, 32)
        # Where two ratios are as good, rounding may decide otherwise: rarely, and at no loss.
        assert float((found == expected).float().mean()) > 0.95
        errors = [
            direct_error(quantize_groupwise(weight, 32, shrink=s).dequantize(), weight, x)
            for s in (found, expected)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_clipping_makes_no_row_worse() -> None:
    """Two groups and few tokens, where settling group by group alone loses a row now and then."""
    for seed in range(30):
        weight, x = gaussian(16, 64, seed), tokens(3, 64, seed, outliers=1.0)
        shrink = search_clip(weight, stats_of(x), 32)
        plain, clipped = (
            ((quantize_groupwise(weight, 32, shrink=s).dequantize() - weight) @ x.T).norm(dim=1)
            for s in (torch.ones_like(shrink), shrink)
        )
        assert bool((clipped <= plain * (1 + 1e-3)).all())


def test_clipping_beats_one_shrink_for_all() -> None:
    weight, x = heavy_tailed(32, 256), tokens(1000, 256, outliers=1.0)
    found = quantize_groupwise(weight, 64, shrink=search_clip(weight, stats_of(x), 64))
    best = direct_error(found.dequantize(), weight, x)
    for ratio in SHRINKS:
        uniform = quantize_groupwise(weight, 64, shrink=ratio).dequantize()
        assert best < direct_error(uniform, weight, x)


def test_clip_per_weight() -> None:
    weights, stats = (
        [heavy_tailed(16, 256, 1), heavy_tailed(16, 256, 2)],
        stats_of(tokens(200, 256)),
    )
    none = quantize_awq(weights, stats, 64, clip=False)
    second = quantize_awq(weights, stats, 64, clip=[False, True])
    assert torch.equal(second.quantized[0].codes, none.quantized[0].codes)
    assert not torch.equal(second.quantized[1].codes, none.quantized[1].codes)
    assert second.error_awq < none.error_awq == none.choice.error
    assert 0 < second.clipped <= 0.5


# ---- bounds, repeatability, the way into the op


class LargestTensors(TorchDispatchMode):
    """Notes the most bytes that any operation allocates for a float and for another tensor."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.floats = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.known:
                continue
            if tensor.is_floating_point():
                self.floats = max(self.floats, storage.nbytes())
            else:
                self.others = max(self.others, storage.nbytes())
        return out


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the second moment no float tensor outgrows a chunk; codes take a byte a weight."""
    channels, outputs, count = 1024, 300, 400
    weight, x = gaussian(outputs, channels), tokens(count, channels)
    stats = ActivationStats(channels)
    assert stats.gram.nbytes == 4 * channels**2
    chunk = 16 * 1408
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", chunk)
    with LargestTensors(weight, x, stats.gram) as seen:
        stats.update(x)
        result = quantize_awq([weight], stats, 128, grid=2)
    assert result.error_awq < result.error_rtn
    assert 0 < seen.floats <= 4 * chunk < weight.nbytes / 10
    assert seen.others == outputs * channels


@pytest.mark.slow
def test_the_widest_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 18944, as a 7B model's down projection: the second moment is all that is large."""
    channels = 18944
    weight, x = gaussian(6, channels), tokens(24, channels)
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", 4 * channels)
    stats = stats_of(x)
    result = quantize_awq([weight], stats, 128, grid=3)
    assert result.error_awq < 0.9 * result.error_rtn
    assert result.error_awq == pytest.approx(direct_error(effective(result), weight, x), rel=1e-3)


def test_chunks_change_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = heavy_tailed(30, 256), stats_of(tokens(200, 256))
    whole = quantize_awq([weight], stats, 64)
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", 7 * 1408)
    parts = quantize_awq([weight], stats, 64)
    assert parts.quantized[0].codes.shape == weight.shape
    assert parts.error_awq == pytest.approx(whole.error_awq, rel=1e-2)
    assert parts.error_rtn == pytest.approx(whole.error_rtn, rel=1e-5)


def test_same_every_time(device: torch.device) -> None:
    weight = heavy_tailed(48, 256).to(device, torch.bfloat16)
    x = tokens(300, 256).to(device)
    first = quantize_awq([weight], stats_of(x[:100], x[100:]), 64)
    again = quantize_awq([weight], stats_of(x[:100], x[100:]), 64)
    assert first.scale.device.type == device.type
    assert torch.equal(first.scale, again.scale)
    for one, other in zip(first.quantized[0], again.quantized[0], strict=True):
        assert torch.equal(one, other)
    assert (first.error_rtn, first.error_awq) == (again.error_rtn, again.error_awq)
    assert first.error_awq < 0.7 * first.error_rtn


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_op_computes_what_was_searched(group_size: int) -> None:
    """Packed and run by the op on divided inputs, the reported error is what comes out."""
    weight, x = heavy_tailed(40, 256), tokens(400, 256)
    result = quantize_awq([weight], stats_of(x), group_size, scale_dtype=torch.bfloat16)
    quantized: Quantized = result.quantized[0]
    qweight = pack_int4(quantized.codes)
    assert torch.equal(
        dequantize(qweight, quantized.scales, quantized.zero_points, group_size),
        quantized.dequantize(),
    )
    out = OP.overload(
        x / result.scale, qweight, quantized.scales, quantized.zero_points, None, group_size
    )
    exact = x.double() @ weight.double().T
    error = float((out.double() - exact).square().sum() / x.shape[0])
    assert error == pytest.approx(result.error_awq, rel=1e-3)
    assert error < 0.01 * result.output_power
