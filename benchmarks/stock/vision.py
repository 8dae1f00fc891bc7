"""The vision towers of the stock pipeline: packed Qwen2.5-VL windows, and CLIP; bf16, int8, fp8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.headline_types import VisionShape
from benchmarks.stock import elementwise as ew
from benchmarks.stock.attention import Attention
from benchmarks.stock.elementwise import Operand, Product
from benchmarks.stock.linears import Linear

MOST_PATCHES = 196_608  # a pass of the tower: bounds memory; more patches go in several passes


@dataclass
class Block:
    """One encoder layer; biases of the norms only with LayerNorm."""

    norms: list[tuple[Tensor, Tensor | None]]
    qkv: Linear
    proj: Linear
    up: Linear  # gate and up merged where the activation is gated
    down: Linear


@dataclass(frozen=True)
class Layout:
    """Where the patches of one picture go; patches come in merge-block order.

    ``order`` puts them window by window, ``back`` the visual tokens back; ``rows`` and ``columns``
    are their coordinates in the window order.
    """

    order: Tensor
    back: Tensor
    rows: Tensor
    columns: Tensor


def window_layout(height: int, width: int, merge: int, window: int) -> Layout:
    """The layout of a ``height`` x ``width`` grid whose sides are multiples of ``window``.

    Raises:
        ValueError: other grids; their windows differ in size and do not stack.
    """
    if height % window or width % window:
        raise ValueError(
            f"a {height} x {width} grid: sides must be multiples of {window}, so that attention's "
            "windows stack"
        )
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def blocks(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).flatten()

    y, x = blocks(y), blocks(x)
    order = torch.argsort((y // window) * (width // window) + x // window, stable=True)
    back = torch.argsort(order[:: merge**2] // merge**2)
    return Layout(order, back, y[order], x[order])


class Vision:
    """Random weights of a tower in one precision, and its forward pass.

    ``kind``: bf16, int8 or fp8 of the encoder layers' linears. The patch embedding and the
    projector stay bf16.
    """

    def __init__(self, shape: VisionShape, kind: str, device: torch.device, seed: int = 1) -> None:
        self.shape, self.kind, self.device = shape, kind, device
        self.windowed = shape.kind == "qwen2_5_vl"
        generator = torch.Generator(device).manual_seed(seed)

        def weight(n: int, k: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(n, k, device=device, generator=generator)
            return (drawn * scale * k**-0.5).bfloat16()

        def vector(n: int, around: float = 0.0) -> Tensor:
            return (around + 0.1 * torch.randn(n, device=device, generator=generator)).bfloat16()

        hidden, gated = shape.hidden, self.windowed
        # Sides that are no multiples of 64 leave cuBLAS unaligned rows: pad with zeros, as exact.
        self.inter = -(-shape.inter // 64) * 64

        def padded(t: Tensor, dim: int) -> Tensor:
            missing = self.inter - shape.inter
            pad = (0, 0, 0, missing) if dim == 0 and t.dim() == 2 else (0, missing)
            return F.pad(t, pad)

        def norm() -> tuple[Tensor, Tensor | None]:
            return vector(hidden, 1.0), None if self.windowed else vector(hidden)

        self.patch = weight(hidden, shape.patch_dim)
        self.blocks = []
        layers = shape.layers if self.windowed else shape.layers - 1  # CLIP: last but one
        for _ in range(layers):
            ups = [weight(shape.inter, hidden) for _ in range(1 + gated)]
            biases = [vector(shape.inter) for _ in range(1 + gated)]
            self.blocks.append(
                Block(
                    [norm(), norm()],
                    Linear(
                        weight(3 * hidden, hidden),
                        vector(3 * hidden),
                        kind,
                        add_bias=not self.windowed,
                    ),
                    Linear(weight(hidden, hidden), vector(hidden), kind),
                    Linear(
                        torch.cat([padded(t, 0) for t in ups]),
                        torch.cat([padded(t, 0) for t in biases]),
                        kind,
                    ),
                    Linear(padded(weight(hidden, shape.inter), 1), vector(hidden), kind),
                )
            )
        merged = hidden * shape.merge**2
        self.final_norm = vector(hidden, 1.0)
        between = merged if self.windowed else shape.out
        self.project = [
            (weight(between, merged), vector(between)),
            (weight(shape.out, between), vector(shape.out)),
        ]
        if not self.windowed:
            self.class_token = vector(hidden)
            self.positions = weight(24 * 24 + 1, hidden)
            self.pre_norm = (vector(hidden, 1.0), vector(hidden))
        self.layouts: dict[tuple[int, int], tuple[Layout, Tensor, Tensor]] = {}

    def weight_bytes(self) -> int:
        blocks = [
            t for b in self.blocks for m in (b.qkv, b.proj, b.up, b.down) for t in m.tensors()
        ]
        return sum(t.nbytes for t in (*blocks, self.patch, *(t for p in self.project for t in p)))

    def layout(self, grid: tuple[int, int]) -> tuple[Layout, Tensor, Tensor]:
        """A grid's layout on the device, and cos and sin ``[patches, D]`` in its order; kept."""
        if grid not in self.layouts:
            shape = self.shape
            found = window_layout(*grid, shape.merge, shape.window)
            quarter = shape.head_dim // 4
            inverse = 10000.0 ** -(torch.arange(quarter) / quarter)
            angle = torch.cat(
                [(t[:, None].float() * inverse) for t in (found.rows, found.columns)], 1
            )
            both = torch.cat((angle, angle), 1)
            on = Layout(*(t.to(self.device) for t in vars(found).values()))
            self.layouts[grid] = on, both.cos().to(self.device), both.sin().to(self.device)
        return self.layouts[grid]

    def forward(
        self, patches: Tensor, grid: tuple[int, int], full: Attention, local: Attention
    ) -> Tensor:
        """Pictures of one grid, ``patches [pictures, height * width, patch_dim]`` bf16, to visual
        tokens ``[pictures, tokens, out]`` bf16; in passes of at most ``MOST_PATCHES``."""
        at_once = max(1, MOST_PATCHES // patches.shape[1])
        one = self._windowed if self.windowed else self._clip
        return torch.cat([one(p, grid, full, local) for p in patches.split(at_once)])

    def _layers(self, x: Tensor, heads_of: Callable[[int, Product], Tensor]) -> Tensor:
        """The encoder layers on ``[T, hidden]``, the last norm's addition left out."""
        shape, eps = self.shape, self.shape.norm_eps
        operand: Operand = ew.norm(x, *self.blocks[0].norms[0], eps, self.kind)
        activate = ew.silu_mul if self.windowed else ew.quick_gelu
        for index, block in enumerate(self.blocks):
            mixed = heads_of(index, block.qkv(operand)).reshape(x.shape)
            to_proj = Operand(mixed) if self.kind == "bf16" else ew.to_operand(mixed, self.kind)
            x, operand = ew.add_norm(block.proj(to_proj), x, *block.norms[1], eps, self.kind)
            product = block.down(activate(block.up(operand), self.kind))
            if index + 1 < len(self.blocks):
                after = self.blocks[index + 1].norms[0]
                x, operand = ew.add_norm(product, x, *after, eps, self.kind)
            elif self.windowed:
                x = ew.add_norm(product, x, self.final_norm, None, shape.norm_eps, "bf16")[1].value
            else:
                x = ew.add(product, x)
        return x

    def _windowed(
        self, patches: Tensor, grid: tuple[int, int], full: Attention, local: Attention
    ) -> Tensor:
        shape = self.shape
        pictures, length, _ = patches.shape
        layout, cos, sin = self.layout(grid)
        x = F.linear(patches, self.patch)[:, layout.order].flatten(0, 1)
        cos, sin = (t.repeat(pictures, 1) for t in (cos, sin))
        window = shape.window**2

        def heads_of(index: int, product: Product) -> Tensor:
            everywhere = index in shape.full_attention
            size = length if everywhere else window
            q, k, v = (
                t.unflatten(0, (-1, size)) for t in ew.vision_rope(product, cos, sin, shape.heads)
            )
            return (full if everywhere else local)(q, k, v, False)

        x = self._layers(x, heads_of)
        x = x.view(pictures, length // shape.merge**2, -1)
        return self._projected(x)[:, layout.back]

    def _clip(
        self, patches: Tensor, grid: tuple[int, int], full: Attention, local: Attention
    ) -> Tensor:
        shape = self.shape
        pictures = patches.shape[0]
        x = F.linear(patches, self.patch)
        x = torch.cat((self.class_token.expand(pictures, 1, -1), x), 1) + self.positions
        size = x.shape[1]
        x = ew.norm(x.flatten(0, 1), *self.pre_norm, shape.norm_eps, "bf16").value

        def heads_of(index: int, product: Product) -> Tensor:
            finished = product.value if product.bias is None else ew.finish(product)
            split = finished.view(pictures, size, 3, shape.heads, shape.head_dim)
            q, k, v = split.unbind(2)
            return full(q, k, v, False)

        x = self._layers(x, heads_of).view(pictures, size, -1)[:, 1:]
        return self._projected(x)

    def _projected(self, x: Tensor) -> Tensor:
        (first, bias), (second, last) = self.project
        return F.linear(F.gelu(F.linear(x, first, bias)), second, last)
