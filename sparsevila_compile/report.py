"""What a pass did, as data: the command line, the artifact and the tests read this, never log lines."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Site(BaseModel):
    """A place in the model: component and module path (and the node, for ``explain``)."""

    model_config = ConfigDict(frozen=True)

    component: str
    where: str
    node: str = ""


class MissGroup(BaseModel):
    """Places that a pass looked at and left alone, for one reason."""

    model_config = ConfigDict(frozen=True)

    reason: str
    sites: tuple[Site, ...]


class PassReport(BaseModel):
    """One pass over one program.

    Attributes:
        name: the pass.
        index: position in the recipe's list, or None for a pass the compiler adds itself.
        stage: its stage.
        options: its resolved configuration.
        matches: where it matched; ``modified`` says whether the program differs afterwards.
        misses: where it did not, by reason.
        nodes_before, nodes_after: graph nodes of all components.
        bytes_before, bytes_after: bytes of all weights.
        seconds: wall-clock time.
        peak_memory_bytes: CUDA peak during the pass, or the process's peak resident memory so far.
        implementations: chosen implementation by ``component/node`` (lowering only).
        fallbacks: why better-placed implementations were passed over, by op and implementation.
        notes: what else the pass has to say (errors of quantisation, ratios, …).
    """

    model_config = ConfigDict(frozen=True)

    name: str
    index: int | None
    stage: str
    options: dict[str, Any]
    matches: tuple[Site, ...]
    misses: tuple[MissGroup, ...]
    modified: bool
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    implementations: dict[str, str] = {}
    fallbacks: dict[str, str] = {}
    notes: dict[str, Any] = {}

    @property
    def miss_count(self) -> int:
        return sum(len(g.sites) for g in self.misses)
