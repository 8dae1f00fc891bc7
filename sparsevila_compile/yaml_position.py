"""YAML as plain data that remembers where every key stood.

Only what recipes need: null, booleans, numbers, strings, lists and mappings with string keys.
Anchors and merge keys work; tags, doubled keys and several documents are refused. Whatever the
bytes are, reading them ends soon and either gives a :class:`Document` or lists problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000  # after aliases are expanded: a few lines of YAML can stand for 2**100 values
MAX_DEPTH = 30
MAX_NUMBER = 40  # characters; longer ones are no numbers that any option takes

_YAML = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core rules for plain words, plus merge keys.

    PyYAML's YAML 1.1 would take the answer ``no`` for false, 1:30 for 90 and 1e-3 for a string.
    """


_CoreLoader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _CoreLoader.add_implicit_resolver(_YAML + _kind, re.compile(rf"^(?:{_pattern})$"), _first)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Mark:
    """A place in a text file, both counted from 1."""

    line: int
    column: int


START = Mark(1, 1)


@dataclass(frozen=True)
class Problem:
    """Something wrong at a key path; ``mark`` is its place where the path itself has none."""

    path: KeyPath
    message: str
    mark: Mark | None = None


@dataclass
class Document:
    """Plain data, and for each key path where its key (or list item) stands."""

    data: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, path: KeyPath) -> Mark:
        """Where a path stands, or the nearest enclosing path that stands somewhere."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return START


def printable(text: str) -> str:
    """The text on one line: line ends and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def dotted(path: KeyPath) -> str:
    """``("passes", 0, "x")`` as ``passes[0].x``."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return printable(out)


def read_text(path: Path) -> tuple[str, Problem | None]:
    """A file's text, or what is wrong with the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return "", Problem((), "there is no such file")
    except IsADirectoryError:
        return "", Problem((), "is a directory; name the recipe file in it")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return "", Problem((), f"cannot be read: {why}")
    if len(data) > MAX_BYTES:
        return "", Problem((), f"is larger than {MAX_BYTES // 1024} KiB; this is no recipe")
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        byte = data[error.start]
        return "", Problem((), f"is not UTF-8 text (byte 0x{byte:02x})", Mark(line, column))


def parse_yaml(text: str) -> Document:
    """Read one YAML document; ``problems`` is empty where it is sound."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax(error))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        code = error.character if isinstance(error.character, int) else ord(error.character)
        document.problems.append(
            Problem((), f"holds the character U+{code:04X}, which YAML does not allow", mark)
        )
    except RecursionError:
        document.problems.append(Problem((), f"is nested deeper than {MAX_DEPTH} levels"))
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        # PyYAML lets some of its own slips through, such as chr() of an escape beyond Unicode.
        document.problems.append(Problem((), f"is not valid YAML: {printable(str(error))[:200]}"))
    else:
        if root is None:
            document.problems.append(Problem((), "is empty; a recipe starts with `version: 1`"))
        else:
            walk = _Walk(document)
            document.data = walk.value(root, ())
    return document


def _syntax(error: yaml.MarkedYAMLError) -> Problem:
    found = error.problem_mark or error.context_mark
    mark = Mark(found.line + 1, found.column + 1) if found else START
    if error.context == "expected a single document in the stream":
        message = "a second document starts here; a recipe is one"
    elif "'\\t'" in (error.problem or ""):
        message = "a tab where YAML wants spaces"
    else:
        said = ", ".join(s for s in (error.context, error.problem) if s)
        message = f"is not valid YAML: {printable(said)}"
    return Problem((), message, mark)


class _TooMuch(Exception):
    """Ends the walk; the problem is recorded already."""


class _Walk:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0
        self.open: set[int] = set()  # nodes being walked: meeting one again is a cycle

    def problem(self, path: KeyPath, message: str, node: yaml.Node | None = None) -> None:
        mark = _mark(node) if node is not None else None
        self.document.problems.append(Problem(path, message, mark))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        try:
            return self._value(node, path)
        except _TooMuch:
            return None

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            self.problem(path, f"stands for more than {MAX_VALUES} values (aliases?)", node)
            raise _TooMuch
        if len(path) > MAX_DEPTH:
            self.problem(path[:3], f"is nested deeper than {MAX_DEPTH} levels", node)
            raise _TooMuch
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self.open:
            self.problem(path, "is an alias of something that contains it", node)
            raise _TooMuch
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)
        finally:
            self.open.discard(id(node))

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> Any:
        if not str(node.tag).endswith(":seq"):
            self.problem(path, f"has the tag {_tag(node)}, which recipes do not take", node)
            return []
        out = []
        for i, item in enumerate(node.value):
            self.document.marks[(*path, i)] = _mark(item)
            out.append(self._value(item, (*path, i)))
        return out

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> Any:
        if not str(node.tag).endswith(":map"):
            self.problem(path, f"has the tag {_tag(node)}, which recipes do not take", node)
            return {}
        out: dict[str, Any] = {}
        first: dict[str, Mark] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key, item in node.value:
            if key.tag == _YAML + "merge":
                merged.extend(self._merge(item, path, 0))
                continue
            name = self._key(key, path)
            if name is None:
                continue
            if name in first:
                there = first[name]
                self.problem((*path, name), f"is given twice (first in line {there.line})", key)
                continue
            first[name] = self.document.marks[(*path, name)] = _mark(key)
            out[name] = self._value(item, (*path, name))
        for key, item in merged:  # a mapping's own keys win over merged ones, earlier over later
            name = self._key(key, path)
            if name is not None and name not in out:
                self.document.marks[(*path, name)] = _mark(key)
                out[name] = self._value(item, (*path, name))
        return out

    def _merge(
        self, node: yaml.Node, path: KeyPath, depth: int
    ) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            self.problem(path, "merges too much with << (aliases?)", node)
            raise _TooMuch
        if isinstance(node, yaml.MappingNode):
            for key, item in node.value:
                if key.tag == _YAML + "merge":
                    yield from self._merge(item, path, depth + 1)
                else:
                    self.count += 1
                    yield key, item
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from self._merge(item, path, depth + 1)
        else:
            self.problem(path, "<< merges mappings; this is none", node)

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self.problem(path, "has a list or mapping as a key; keys are words", node)
            return None
        if not _encodable(node.value):
            self.problem(path, "has a key with half a character (a lone surrogate)", node)
            return None
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = str(node.value)
        kind = str(node.tag).removeprefix(_YAML)
        if not _encodable(text):
            self.problem(path, "holds half a character (a lone surrogate)", node)
            return ""
        if kind == "str":
            return text
        if kind not in ("null", "bool", "int", "float"):
            self.problem(path, f"has the tag {_tag(node)}, which recipes do not take", node)
            return None
        if kind in ("int", "float") and len(text) > MAX_NUMBER:
            self.problem(path, f"is a number of {len(text)} characters", node)
            return None
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0 if text[:2] in ("0x", "0o") else 10)
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):  # an explicit tag on something else
            self.problem(path, f"{printable(text)[:60]!r} is no {kind}", node)
            return None
        if not math.isfinite(number):
            self.problem(path, f"must be a finite number, not {text}", node)
            return None
        return number


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tag(node: yaml.Node) -> str:
    return printable(str(node.tag).replace(_YAML, "!!"))[:60]


def _mark(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)
