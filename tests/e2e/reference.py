"""Pruning and retrieval once more, from transformers' eager attention and its full matrices.

Nothing here comes from the package: kept sets, positions, retrieved sets and answers are worked out
from attention weights that transformers itself returns, every step over the whole sequence, without
any cache. Slow and plain, so that it can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen_code
from transformers.vision_utils import get_vision_window_index

from tests import tiny
from tests.tiny import MERGE, Image, Item, Row, Video

KV_HEADS = 2


def share(ratio: float, n: int) -> int:
    """ceil(ratio · n) in exact arithmetic."""
    return math.ceil(Fraction(str(ratio)) * n)


def best(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending; of equal ones the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:count])


@cache
def eager(name: str) -> Any:
    """The same weights with transformers' eager attention everywhere."""
    model = tiny.build(name)
    model.set_attn_implementation("eager")
    if tiny.is_qwen(name):
        AttentionInterface.register("eager_seen", _eager_seen)
        model.model.visual.config._attn_implementation = "eager_seen"
    return model


_seen: dict[int, list[torch.Tensor]] = {}


def _eager_seen(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' own eager attention of this encoder, which keeps the weights to itself."""
    out, weights = qwen_code.eager_attention_forward(module, *args, **kwargs)
    _seen.setdefault(id(module), []).append(weights)
    return out, weights


# ---------------------------------------------------------------------- the encoder


@dataclass
class Encoded:
    """One picture: its visual tokens ``[n, width]`` and their salience ``[n]``."""

    tokens: torch.Tensor
    salience: torch.Tensor
    frames: int
    coordinates: list[tuple[int, int, int]]


def encode(
    name: str,
    item: Image | Video,
    score: str = "auto",
    layer: int | None = None,
    pool: str = "mean",
) -> Encoded:
    """Encode one picture alone."""
    if tiny.is_qwen(name):
        return _encode_qwen(name, item, layer, pool)
    model = eager(name)
    pixels = tiny.inputs(name, [[item]])["pixel_values"]
    weights: list[torch.Tensor] = []
    tower = model.model.vision_tower
    hooks = [
        block.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
        for block in getattr(tower, "vision_model", tower).encoder.layers
    ]
    try:
        tokens = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
    finally:
        for hook in hooks:
            hook.remove()
    chosen = weights[-1 if layer is None else layer][0].mean(0)  # over heads
    has_cls = name != "llava_siglip"
    if has_cls and score in ("auto", "cls"):
        salience = chosen[0, 1:]
    else:
        first = 1 if has_cls else 0
        salience = chosen[first:, first:].mean(0)
    side = math.isqrt(len(tokens))
    grid = [(0, h, w) for h in range(side) for w in range(side)]
    return Encoded(tokens.reshape(len(grid), -1), salience, 1, grid)


def _encode_qwen(name: str, item: Image | Video, layer: int | None, pool: str) -> Encoded:
    visual = eager(name).model.visual
    prompt = tiny.inputs(name, [[item]])
    kind = "video" if isinstance(item, Video) else "image"
    grid = prompt[f"{kind}_grid_thw"]
    pixels = prompt["pixel_values_videos" if kind == "video" else "pixel_values"]
    _seen.clear()
    tokens = visual(pixels, grid_thw=grid).pooler_output
    # By default the last layer of full attention; frames attend themselves only.
    block = visual.blocks[3 if layer is None else layer]
    parts = [weights[0].mean(0).mean(0) for weights in _seen[id(block.attn)]]
    groups = torch.cat(parts).reshape(-1, MERGE**2)
    pooled = groups.mean(1) if pool == "mean" else groups.max(1).values
    index, _ = get_vision_window_index(grid, MERGE, 56, 14)
    salience = torch.empty_like(pooled)
    salience[index] = pooled  # the encoder sees merge units in the order of `index`
    t, h, w = (int(n) for n in grid[0])
    cells = [(f, y, x) for f in range(t) for y in range(h // MERGE) for x in range(w // MERGE)]
    return Encoded(tokens, salience, t, cells)


@dataclass(frozen=True)
class Prune:
    """The options of ``prune_visual_tokens``, by their own names."""

    keep_ratio: float = 1.0
    budget: str = "image"
    positions: str = "original"
    score: str = "auto"
    layer: int | None = None
    pool: str = "mean"

    def spec(self) -> tuple[str, dict[str, Any]]:
        return "prune_visual_tokens", dict(vars(self))


def kept(pictures: list[Encoded], prune: Prune) -> list[list[int]]:
    """Kept tokens of every new picture of a prompt."""
    if prune.budget == "prompt":
        scores = torch.cat([p.salience for p in pictures]) if pictures else torch.empty(0)
        chosen = best(scores, share(prune.keep_ratio, len(scores)))
        result, start = [], 0
        for p in pictures:
            end = start + len(p.salience)
            result.append([i - start for i in chosen if start <= i < end])
            start = end
        return result
    result = []
    for p in pictures:
        parts = p.frames if prune.budget == "frame" else 1
        size = len(p.salience) // parts
        mine: list[int] = []
        for f in range(parts):
            scores = p.salience[f * size : (f + 1) * size]
            mine += [f * size + i for i in best(scores, share(prune.keep_ratio, size))]
        result.append(mine)
    return result


# ---------------------------------------------------------------------- the dialogue


@dataclass
class Dialogue:
    """One dialogue, answered by transformers' language model over the tokens that are left.

    ``visible`` holds, for each layer, which position each position attends: ``[KV_HEADS, n, n]``.
    ``sets`` are the retrieved positions of the last turn: by layer, by KV head.
    """

    name: str
    prune: Prune = Prune()
    retrieve: float | None = None
    per_head: bool = False
    layers: tuple[int, ...] = (0, 1)
    embeds: list[torch.Tensor] = field(default_factory=list)
    positions: list[tuple[int, ...]] = field(default_factory=list)
    visual: list[bool] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)
    sets: list[list[list[int]]] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    cursor: int = 0  # position of the next text token
    last: int | None = None  # the last answer's last token, not fed yet

    def __post_init__(self) -> None:
        self.visible = [torch.zeros(KV_HEADS, 0, 0, dtype=torch.bool) for _ in (0, 1)]

    # ---- laying out

    def _add(self, embed: torch.Tensor, position: tuple[int, ...], visual: bool) -> None:
        self.embeds.append(embed)
        self.positions.append(position)
        self.visual.append(visual)
        n = len(self.embeds)
        for i, old in enumerate(self.visible):
            new = torch.zeros(KV_HEADS, n, n, dtype=torch.bool)
            new[:, :-1, :-1] = old
            new[:, -1] = True
            self.visible[i] = new

    def _text(self, token: int) -> None:
        table = eager(self.name).get_input_embeddings().weight
        self._add(table[token], (self.cursor,) * 3, False)
        self.cursor += 1

    def _picture(self, item: Image | Video, encoded: Encoded, mine: list[int]) -> None:
        qwen = tiny.is_qwen(self.name)
        if qwen:
            self._text(tiny.VISION_START)
        cells = [encoded.coordinates[i] for i in mine]
        if not qwen:
            cells = [(i, i, i) for i in mine]
        if self.prune.positions == "compact":
            ranks = [
                {c: r for r, c in enumerate(sorted({cell[a] for cell in cells}))} for a in range(3)
            ]
            cells = [(ranks[0][t], ranks[1][y], ranks[2][x]) for t, y, x in cells]
            after = 1 + max((max(cell) for cell in cells), default=-1)
        elif qwen:
            step = int(2 * item.seconds) if isinstance(item, Video) else 1
            cells = [(t * step, y, x) for t, y, x in cells]
            after = max(max(y, x) + 1 for _, y, x in encoded.coordinates)
        else:
            after = len(encoded.tokens)
        for i, cell in zip(mine, cells, strict=True):
            self._add(encoded.tokens[i], tuple(self.cursor + c for c in cell), True)
        self.cursor += after
        if qwen:
            self._text(tiny.VISION_END)

    def feed(self, items: Iterable[Item]) -> int:
        """Add a turn's new items; returns how many of the last tokens ask."""
        items = list(items)
        options = {k: getattr(self.prune, k) for k in ("score", "layer", "pool")}
        encoded = [encode(self.name, i, **options) for i in items if not isinstance(i, int)]
        chosen = kept(encoded, self.prune)
        queue = list(zip(encoded, chosen, strict=True))
        if not self.embeds:
            self._text(tiny.BOS)
        if self.last is not None:
            self._text(self.last)
            self.last = None
        start = len(self.embeds)
        if start == 1:
            start = 0  # the first turn's <s> asks too where no picture stands behind it
        for item in items:
            if isinstance(item, int):
                self._text(item)
            else:
                self._picture(item, *queue.pop(0))
        asking = 0
        while asking < len(self.embeds) - start and not self.visual[-1 - asking]:
            asking += 1
        return asking

    # ---- running

    @torch.no_grad()
    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of the last position and each layer's attention weights ``[heads, n, n]``."""
        model = eager(self.name)
        text = model.model.language_model
        weights: list[torch.Tensor] = []
        n = len(self.embeds)
        positions = torch.tensor(self.positions).T[:, None]
        if not tiny.is_qwen(self.name):
            positions = positions[0]
        masks = [
            torch.zeros(v.shape).masked_fill(~v, float("-inf")).repeat_interleave(4 // KV_HEADS, 0)
            for v in self.visible
        ]
        with _hooked([layer.self_attn for layer in text.layers], masks, weights.append):
            out = text(
                inputs_embeds=torch.stack(self.embeds)[None],
                position_ids=positions,
                attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool).tril(),
                use_cache=False,
            )
        logits = model.lm_head(out.last_hidden_state[0, -1])
        return logits, [w[0] for w in weights]

    def ask(self, items: Iterable[Item], new_tokens: int) -> list[int]:
        """Answer one turn greedily."""
        asking = self.feed(items)
        logits, weights = self.forward()
        self._choose(weights, asking)
        answer = []
        for step in range(new_tokens):
            token = int(logits.argmax())
            answer.append(token)
            if step + 1 == new_tokens:
                self.last = token
                break
            self._text(token)
            self._hide()
            logits, _ = self.forward()
        return answer

    def _choose(self, weights: list[torch.Tensor], asking: int) -> None:
        columns = [j for j, v in enumerate(self.visual) if v]
        self.sets, self.scores = [], []
        for layer, w in enumerate(weights):
            rows = w[:, -asking:][:, :, columns].mean(1)  # [heads, visual]
            by_head = torch.stack([part.mean(0) for part in rows.chunk(KV_HEADS)])
            scores = by_head if self.per_head else by_head.mean(0, keepdim=True)
            self.scores.append(scores)
            if self.retrieve is None or layer not in self.layers:
                self.sets.append([columns] * KV_HEADS)
                continue
            count = share(self.retrieve, len(columns))
            mine = [[columns[i] for i in best(s, count)] for s in scores]
            self.sets.append(mine if self.per_head else mine * KV_HEADS)

    def _hide(self) -> None:
        """The newest token attends text and what was retrieved."""
        n = len(self.embeds)
        for visible, sets in zip(self.visible, self.sets, strict=True):
            for head, chosen in enumerate(sets):
                row = torch.tensor([not v for v in self.visual])
                row[chosen] = True
                visible[head, n - 1] = row


@contextmanager
def _hooked(
    modules: list[torch.nn.Module], masks: list[torch.Tensor], seen: Callable[[torch.Tensor], None]
) -> Any:
    """Give every layer its own additive mask, and hand its weights on."""
    hooks = []
    for module, mask in zip(modules, masks, strict=True):

        def use(m: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask[None]}

        hooks.append(module.register_forward_pre_hook(use, with_kwargs=True))
        hooks.append(module.register_forward_hook(lambda m, a, out: seen(out[1])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plain(name: str, row: Row, new_tokens: int) -> list[int]:
    """The reference with nothing pruned or retrieved: must be ``generate`` itself."""
    return Dialogue(name).ask(row, new_tokens)
