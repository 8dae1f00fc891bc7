"""What the backend did to one model, and what it could not do."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from sparsevila_compile.conversation import Usage
from sparsevila_compile.errors import UserError
from sparsevila_compile.report import PassReport


class BackendWarning(UserWarning):
    """Something of the recipe is not done; the message says what, why, and what to change."""


@dataclass(frozen=True)
class NotDone:
    """A pass of the recipe that was not applied.

    Attributes:
        name: the pass, or ``*`` for the whole recipe.
        why: the reason.
        change: what the user can change.
    """

    name: str
    why: str
    change: str

    def __str__(self) -> str:
        what = "no pass of the recipe" if self.name == "*" else f"{self.name}: not"
        return f"{what} applied: {self.why}; {self.change}"


@dataclass
class BackendReport:
    """What ``backend="sparsevila"`` did to a model.

    Attributes:
        recipe: name of the recipe file, or ``default`` or ``<options>``.
        inner: what compiles the rewritten graphs.
        passes: one report a pass that ran.
        not_done: passes that could not be applied.
        unused: keys of the recipe that have no meaning here.
        graphs: graphs of the model's forward that Dynamo has handed over; all but the first of each
            kind are recompilations.
        freed_bytes: of weights that were replaced and are no longer in memory.
        usage: what the last turn cost.
    """

    recipe: str = ""
    inner: str = ""
    passes: list[PassReport] = field(default_factory=list)
    not_done: list[NotDone] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    graphs: int = 0
    freed_bytes: int = 0
    usage: Usage = field(default_factory=Usage)

    def missed(self, name: str, why: str, change: str, strict: bool) -> None:
        """Note that a pass is not applied, and warn.

        Raises:
            UserError: ``strict``.
        """
        entry = NotDone(name, why, change)
        if strict:
            raise UserError(f"backend sparsevila (strict): {entry}")
        if entry not in self.not_done:
            self.not_done.append(entry)
            warnings.warn(f"backend sparsevila: {entry}", BackendWarning, stacklevel=2)
