"""Decode: steps whose inputs live on the device, one CUDA graph a token, and the loop around them.

A step reads and advances buffers that stay where they are (last token, position, cache length,
which rows go on), so a captured graph serves every later token of any length; it is captured again
only where a buffer moves (the cache grew, retrieval became wider). On the CPU, and where another
runtime runs the graphs, the same function simply runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsevila_compile.ops import GREEDY_STEP

if TYPE_CHECKING:
    from sparsevila_compile.engine import Engine, KVCache, Retrieved

_MIN_WIDTH = 64
"""Retrieved positions that an index buffer holds at least."""


def index_width(needed: int) -> int:
    """Width of an index buffer: ``needed`` rounded up by an eighth at most, so that turns share it."""
    step = max(_MIN_WIDTH, (1 << max(needed - 1, 1).bit_length()) // 16)
    return -(-needed // step) * step


class Decoder:
    """Decode steps over one cache.

    Attributes:
        tokens: int64 ``[batch]``, the last token of each row, not in the cache yet.
        alive: int32 ``[batch]``, 1 for rows that go on; others write nothing.
        lens: int32 ``[batch]``, cache positions in use.
        captures: CUDA graphs captured so far.
    """

    def __init__(self, engine: Engine, cache: KVCache) -> None:
        self.engine, self.cache = engine, cache
        device, batch = engine.device, cache.batch
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.alive = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.captures = 0
        self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._rows = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._pad = torch.zeros((), dtype=torch.int64, device=device)
        self._ends = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._tail = torch.zeros(batch, dtype=torch.int32, device=device)
        shape = torch.empty((batch, 1), dtype=engine.program.dtype, device=device)
        rows = (self.tokens, self.alive, self.lens, self._positions[:, 0])
        step = GREEDY_STEP.choose(device, shape, *rows, self._ends, self._pad)
        self._advance = GREEDY_STEP.function(step.name)
        self._index: dict[str, torch.Tensor] = {}
        self._sparse = False
        self._graphs: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._place: list[tuple[int, torch.Size]] = []
        self._flags: list[tuple[torch.Tensor, Any]] = []

    # ------------------------------------------------------------------- turns

    @torch.inference_mode()
    def begin(
        self, positions: list[int], retrieved: Retrieved | None, pad: int, ends: torch.Tensor
    ) -> None:
        """Start a turn's decode: cache lengths and retrieval as they are now, all rows alive.

        Args:
            positions: by row, the position of the first new token.
            ends: int64 ``[n]``, tokens that end a row in :meth:`step` with ``greedy``.
        """
        self.lens.copy_(torch.tensor(self.cache.lens, dtype=torch.int32))
        self._positions.copy_(torch.tensor(positions)[:, None])
        self.alive.fill_(1)
        self._pad.fill_(pad)
        self._flags.clear()
        if len(ends) != len(self._ends):
            self._graphs.clear()
            self._ends = ends.to(self._ends, copy=True)
        else:
            self._ends.copy_(ends)
        self._sparse = retrieved is not None
        if retrieved is not None:
            self._tail.copy_(retrieved.tail_start)
            for name, found in retrieved.index.items():
                self._fill_index(name, found)
        # Places, not tensors: to hold on to those would keep a cache that has grown in memory twice.
        place = [(t.data_ptr(), t.shape) for t in self.cache.tensors.values()]
        if place != self._place:
            self._graphs.clear()  # they write to where the cache was
            self._place = place

    def _fill_index(self, name: str, found: torch.Tensor) -> None:
        width = found.shape[2]
        buffer = self._index.get(name)
        if buffer is None or buffer.shape[2] < width or index_width(width) * 2 < buffer.shape[2]:
            self._graphs.clear()
            buffer = found.new_empty((*found.shape[:2], index_width(width)))
            self._index[name] = buffer
        buffer[:, :, :width] = found
        buffer[:, :, width:] = -1

    # ------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self, greedy: bool) -> torch.Tensor:
        """Feed :attr:`tokens` of the rows that are alive; returns logits ``[batch, vocabulary]``.

        With ``greedy``, also chooses the next tokens and ends rows, all on the device. On CUDA the
        next step overwrites the logits.
        """
        call = self._greedy if greedy else self._forward
        if self.engine.device.type != "cuda" or not self.engine.runner.capturable:
            return call()
        key = (greedy, self._sparse)
        if key not in self._graphs:
            self._graphs[key] = self._capture(call)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _forward(self, count: bool = True) -> torch.Tensor:
        run, positions = self.engine.run, self._positions
        inputs: dict[str, Any] = {
            "inputs_embeds": run("embed", {"input_ids": self.tokens[:, None]})["inputs_embeds"],
            "position_ids": positions.expand(3, -1, -1) if self.engine.axes == 3 else positions,
            "logit_rows": self._rows,
            "cache_lens": self.lens,
            "new_lens": self.alive,
            **self.cache.tensors,
        }
        if self._sparse:
            inputs |= self._index
            inputs["tail_start"] = self._tail
        logits: torch.Tensor = run("decode" if self._sparse else "language", inputs)["logits"][:, 0]
        if count:
            self.lens.add_(self.alive)
            self._positions.add_(self.alive[:, None])
        return logits

    def _greedy(self) -> torch.Tensor:
        logits, at = self._forward(count=False), self._positions[:, 0]
        self._advance(logits, self.tokens, self.alive, self.lens, at, self._ends, self._pad)
        return logits

    @torch.inference_mode()
    def choose(self, picked: torch.Tensor) -> None:
        """Set the next tokens (int64 ``[batch]``); rows that have ended get the pad token."""
        self.tokens.copy_(torch.where(self.alive.bool(), picked, self._pad))

    @torch.inference_mode()
    def end(self, done: torch.Tensor) -> None:
        """End rows (bool ``[batch]``)."""
        self.alive.mul_(~done)

    def _capture(
        self, call: Callable[[], torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # The run that loads and compiles kernels must leave no trace: no row is alive in it.
        tokens, alive = self.tokens.clone(), self.alive.clone()
        self.alive.zero_()
        current = torch.cuda.current_stream(self.engine.device)
        side = torch.cuda.Stream(self.engine.device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call()
        current.wait_stream(side)
        self.tokens.copy_(tokens)
        self.alive.copy_(alive)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = call()
        self.captures += 1
        return graph, logits

    @torch.inference_mode()
    def running(self, behind: int = 0) -> bool:
        """Whether any row was alive ``behind`` calls ago: the loop's only wait for the device.

        Looking one call back lets the device work on a step while the host waits for the last.
        """
        flag = self.alive.any()
        if flag.device.type != "cuda":
            return bool(flag)
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._flags.append((host, event))
        if len(self._flags) <= behind:
            return True
        host, event = self._flags.pop(0)
        event.synchronize()
        return bool(host)


@dataclass
class Sampling:
    """How the loop chooses tokens and when it stops.

    Attributes:
        processors: transformers' logits processors.
        criteria: transformers' stopping criteria.
        draw: draw from the distribution, else take the most likely token.
        ends: int64 ``[n]``, end-of-sequence tokens, where the criteria are those and a length limit
            and nothing else; else None.
        limit: columns of the sequence at most, the prompt's included.
        watched: the caller's own objects look on, so no step may be done for nothing.
    """

    processors: Any
    criteria: Any
    draw: bool
    ends: torch.Tensor | None
    limit: int
    watched: bool

    @property
    def greedy(self) -> bool:
        """Whether a step can choose its token by itself."""
        return self.ends is not None and not self.draw and not len(self.processors)

    def pick(self, sequence: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
        scores = self.processors(sequence, logits.float())
        if self.draw:
            return torch.multinomial(torch.softmax(scores, -1), 1)[:, 0], scores
        return scores.argmax(-1), scores


def generate_tokens(
    decoder: Decoder,
    sequence: torch.Tensor,
    length: int,
    logits: torch.Tensor,
    sampling: Sampling,
    streamer: Any,
) -> None:
    """Fill ``sequence`` int64 ``[batch, limit]`` from column ``length`` on until all rows have ended.

    Each row gets one token more than its cache grows by (:attr:`Decoder.lens` tells).
    """
    greedy = sampling.greedy
    behind = 0 if sampling.watched or sampling.ends is None else 1
    chosen = False  # by the step itself
    while True:
        if not chosen:
            picked, scores = sampling.pick(sequence[:, :length], logits)
            decoder.choose(picked)
        sequence[:, length] = decoder.tokens
        length += 1
        if streamer is not None:
            streamer.put(decoder.tokens.cpu())
        if not chosen:
            decoder.end(sampling.criteria(sequence[:, :length], scores))
        if length == sequence.shape[1] or not decoder.running(behind):
            return
        logits = decoder.step(greedy)
        chosen = greedy
