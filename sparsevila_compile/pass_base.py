"""What a pass is: ``requires`` → ``match`` → ``rewrite`` each match → ``finish`` → ``ensures``.

``match`` is pure: it yields, in graph order, a :class:`Match` or a :class:`Miss` with its reason,
and changes nothing, so that ``plan`` and ``explain`` are free. Everything else (snapshots, timing,
verification, roll-back, the report) belongs to the manager.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import fx

from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_edit import module_path
from sparsevila_compile.program import Program, Stage
from sparsevila_compile.report import Site


class PassConfig(BaseModel):
    """Base of every pass's options; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optional: bool = Field(
        default=False, description="Let the pass match nothing without that being an error."
    )


@dataclass(frozen=True)
class Match:
    """A place to rewrite; ``data`` carries what ``match`` found out about it."""

    component: str
    node: fx.Node
    data: Any = None
    where: str = ""

    def site(self) -> Site:
        return Site(
            component=self.component,
            where=self.where or module_path(self.node),
            node=self.node.name,
        )


@dataclass(frozen=True)
class Miss:
    """A place that looks like one to rewrite, and why it is not."""

    component: str
    reason: str
    where: str
    node: str = ""

    def site(self) -> Site:
        return Site(component=self.component, where=self.where, node=self.node)


@dataclass
class Context:
    """What passes may use besides the program.

    Attributes:
        processor: the checkpoint's processor, or None (planning).
        dry: no weights are at hand (planning): rewrite shapes, compute nothing.
        progress: called with (what, done, total) from long loops.
        base: directory that relative paths in pass options start from.
    """

    processor: Any = None
    dry: bool = False
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    base: str = "."
    notes: dict[str, Any] = field(default_factory=dict)


C = TypeVar("C", bound=PassConfig)


class Pass(ABC, Generic[C]):
    """Base of all passes.

    Class attributes:
        name: the recipe's name for it.
        stage: when it may run; recipes that list passes out of stage order are refused.
        config_type: its options.
        repeatable: whether a recipe may list it more than once.
        summary: one line for tables.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]
    config_type: ClassVar[type[PassConfig]]
    repeatable: ClassVar[bool] = False

    def __init__(self, config: C) -> None:
        self.config = config

    def requires(self, program: Program) -> None:
        """Raise UserError where the program is not ready for this pass."""

    @abstractmethod
    def match(self, program: Program) -> Iterator[Match | Miss]:
        """Find what to rewrite, in graph order, changing nothing."""

    def prepare(self, program: Program, matches: list[Match], context: Context) -> None:
        """What needs all matches before the first is rewritten (calibration); edits nothing."""

    @abstractmethod
    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        """Rewrite one match."""

    def spends_weights(self, program: Program) -> bool:
        """Whether ``rewrite`` frees weights as it goes, so that a failure in it cannot be undone."""
        return False

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        """What is left to do once all matches are rewritten."""

    def ensures(self, program: Program) -> None:
        """Raise GraphError where the result is not what this pass promises."""


PASSES: dict[str, type[Pass[Any]]] = {}


def register(cls: type[Pass[Any]]) -> type[Pass[Any]]:
    """Class decorator: make a pass known to recipes by its name."""
    if cls.name in PASSES:
        raise ValueError(f"two passes are named {cls.name}")
    PASSES[cls.name] = cls
    return cls


class PassError(UserError):
    """A pass refused the program; ``index`` is its place in the recipe's list, if it has one."""

    def __init__(self, message: str, index: int | None) -> None:
        super().__init__(message)
        self.index = index


def calls(program: Program, component: str, target: Any) -> Iterator[fx.Node]:
    """The nodes of a component that call ``target``, in graph order."""
    for node in list(program.component(component).graph.nodes):
        if node.op == "call_function" and node.target is target:
            yield node


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The node's fake tensor."""
    value: torch.Tensor = node.meta["val"]
    return value
