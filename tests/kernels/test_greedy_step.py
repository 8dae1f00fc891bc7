"""``greedy_step``: every implementation against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsevila_compile.kernels.greedy_step.op import OP

greedy_step = torch.ops.sparsevila.greedy_step
IMPLEMENTATIONS = ["reference", "triton"]


class Case:
    """One step's arguments; every other row from the second on has ended."""

    def __init__(
        self,
        device: torch.device,
        rows: int = 3,
        vocabulary: int = 5000,
        ends: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(rows * vocabulary)
        self.logits = torch.randn(rows, vocabulary, generator=g).to(device, dtype)
        self.tokens = torch.arange(rows, device=device) + 70
        self.alive = torch.tensor([1, 0] * rows, dtype=torch.int32, device=device)[:rows].clone()
        self.lens = torch.arange(rows, dtype=torch.int32, device=device) + 9
        self.positions = torch.full((rows, 1), 33, device=device)[:, 0]
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.pad = torch.tensor(2, device=device)

    @property
    def args(self) -> tuple[Tensor, ...]:
        rows = (self.tokens, self.alive, self.lens, self.positions)
        return (self.logits, *rows, self.ends, self.pad)

    def expected(self) -> list[tuple[int, int, int, int]]:
        """By row: token, alive, length, position."""
        found = []
        for b, row in enumerate(self.logits.tolist()):
            lives = int(self.alive[b])
            token = row.index(max(row)) if lives else int(self.pad)
            goes_on = int(lives and token not in self.ends.tolist())
            found.append((token, goes_on, 9 + b + lives, 33 + lives))
        return found

    def written(self) -> list[tuple[int, int, int, int]]:
        rows = (self.tokens, self.alive, self.lens, self.positions)
        return list(zip(*(r.tolist() for r in rows), strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 3, 2048, 2049, 9000])
@pytest.mark.usefixtures("poisoned_memory")
def test_as_a_loop(vocabulary: int, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    case = Case(device, 5, vocabulary, (1, 4), dtype)
    wanted = case.expected()
    greedy_step(*case.args, impl=impl)
    assert case.written() == wanted
    others = [(t + 1, a, n, p) for t, a, n, p in wanted]
    assert case.written() != others


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ends(impl: str, device: torch.device) -> None:
    """A row ends with any of the tokens, and with none where there are none."""
    for ends in ((), (11,), (6, 11, 17)):
        case = Case(device, 1, 40, ends)
        case.logits[0, 11] = 50
        greedy_step(*case.args, impl=impl)
        assert case.tokens.tolist() == [11]
        assert case.alive.tolist() == [0 if 11 in ends else 1]
        greedy_step(*case.args, impl=impl)
        assert case.tokens.tolist() == [2 if 11 in ends else 11]
        assert case.lens.tolist() == [10 if 11 in ends else 11]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_first_of_equals(impl: str, device: torch.device) -> None:
    """Within a stretch of a program's logits, and across stretches."""
    case = Case(device, 1, 9000)
    case.logits.zero_()
    for at in (8191, 8000, 4097, 4095, 700):
        case.logits[0, at] = 1
        case.alive.fill_(1)
        greedy_step(*case.args, impl=impl)
        assert case.tokens.tolist() == [at]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_and_negative_logits(impl: str, device: torch.device) -> None:
    case = Case(device, 4, 3000)
    case.logits -= 100
    wanted = case.expected()
    wide = case.logits.new_zeros(4, 2, 3000)
    wide[:, 0] = case.logits
    case.logits = wide[:, 0]
    greedy_step(*case.args, impl=impl)
    assert case.written() == wanted


def test_opcheck(device: torch.device) -> None:
    torch.library.opcheck(greedy_step.default, Case(device).args)


def test_refusals(device: torch.device) -> None:
    case = Case(device)
    with pytest.raises(ValueError, match="logits must be a float"):
        OP.overload(case.logits.long(), *case.args[1:])
    with pytest.raises(ValueError, match="alive must be an integer"):
        OP.overload(*case.args[:2], case.alive[:1], *case.args[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_in_a_graph(rows: int, device: torch.device) -> None:
    """Captured once, replayed on other logits: the same as one step after the other."""
    case, twin = (Case(device, rows, 152064, (3,), torch.bfloat16) for _ in range(2))
    greedy_step(*case.args, impl="triton")
    greedy_step(*twin.args, impl="reference")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        greedy_step(*case.args, impl="triton")
    for _ in range(5):
        case.logits.normal_()
        twin.logits.copy_(case.logits)
        graph.replay()
        greedy_step(*twin.args, impl="reference")
        assert case.written() == twin.written()
