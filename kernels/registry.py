"""Canonical ops of the ``sparsevila`` namespace and the implementations they can be bound to.

An op is declared once, with its schema, its fake and its reference. Further implementations
register under a name. Three questions are kept apart: may an implementation run on this device
(``supported``), can it take these arguments (``supports_args``), and which of those that can
should it be (the order of registration, best first, with ``reference`` always last). The lowering
pass asks :meth:`Op.choose` once and writes the answer into the node's ``impl`` argument, so that a
graph shows what it will run; nothing is chosen at run time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "sparsevila"
REFERENCE = "reference"

_library = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, Op] = {}

Reason = str | None
"""Why something cannot be done, or None where it can."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    ``supported(device)`` and ``supports_args(*args, **kwargs)`` return None, or the reason why not.
    ``supports_args`` gets the op's own arguments (fake tensors included) without ``impl``.
    """

    name: str
    function: Callable[..., Any]
    supported: Callable[[torch.device], Reason]
    supports_args: Callable[..., Reason]


@dataclass(frozen=True)
class Choice:
    """What :meth:`Op.choose` settled on, and why each better-placed implementation was passed over."""

    name: str
    rejected: dict[str, str]


class Op:
    """A canonical op: ``torch.ops.sparsevila.<name>``.

    Every schema ends in ``*, str impl="reference"``. ``reference`` defines the semantics; all
    implementations take its parameters by the same names.
    """

    def __init__(
        self, name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        if not schema.split("->")[0].rstrip().endswith(f'*, str impl="{REFERENCE}")'):
            raise ValueError(
                f'{name}: the schema must end its arguments in *, str impl="{REFERENCE}"'
            )
        if name in OPS:
            raise ValueError(f"{name} is declared twice")
        self.name = name
        self.reference = reference
        self._parameters = list(inspect.signature(reference).parameters)
        self.implementations: dict[str, Implementation] = {}
        self._functions: dict[str, Callable[..., Any]] = {REFERENCE: reference}
        _library.define(name + schema)
        declared = [a.name for a in self.overload._schema.arguments if a.name != "impl"]
        if declared != self._parameters:
            raise ValueError(f"{name}: schema has {declared}, reference has {self._parameters}")
        _library.impl(name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._with_impl(fake), lib=_library)
        OPS[name] = self

    @property
    def overload(self) -> Any:
        """The ``OpOverload`` that graphs hold."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def function(self, impl: str) -> Callable[..., Any]:
        """The Python function of an implementation, for callers that need no dispatcher.

        Raises:
            ValueError: there is none of that name.
        """
        if impl not in self._functions:
            raise ValueError(
                f"{self.name} has no implementation {impl!r}; it has {sorted(self._functions)}"
            )
        return self._functions[impl]

    def _dispatch(self, *args: Any, impl: str = REFERENCE, **kwargs: Any) -> Any:
        return self.function(impl)(*args, **kwargs)

    @staticmethod
    def _with_impl(fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, impl: str = REFERENCE, **kwargs: Any) -> Any:
            return fake(*args, **kwargs)

        return run

    def implement(
        self,
        name: str,
        *,
        supported: Callable[[torch.device], Reason],
        supports_args: Callable[..., Reason] = lambda *a, **k: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation; its parameters must be the reference's, by name and order."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._functions:
                raise ValueError(f"{self.name} has an implementation {name!r} already")
            given = list(inspect.signature(function).parameters)
            if given != self._parameters:
                raise ValueError(
                    f"{self.name}/{name}: parameters {given} are not {self._parameters}"
                )
            self.implementations[name] = Implementation(name, function, supported, supports_args)
            self._functions[name] = function
            return function

        return register

    def choose(self, device: torch.device, *args: Any, **kwargs: Any) -> Choice:
        """The first registered implementation that can run these arguments on this device."""
        rejected: dict[str, str] = {}
        for implementation in self.implementations.values():
            reason = implementation.supported(device) or implementation.supports_args(
                *args, **kwargs
            )
            if reason is None:
                return Choice(implementation.name, rejected)
            rejected[implementation.name] = reason
        return Choice(REFERENCE, rejected)
