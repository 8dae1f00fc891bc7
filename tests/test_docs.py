"""The documentation says what the code does: its examples run, its names, tables and messages exist.

``python tests/test_docs.py --write`` rewrites the table of passes.
"""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # run as a script, too
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GENERATED = re.compile(r"<!-- table -->\n.*?<!-- end -->", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block; a first line that is a comment says which file it is."""

    page: str
    line: int
    language: str
    code: str

    @property
    def title(self) -> str:
        first = self.code.partition("\n")[0]
        return first.removeprefix("# ") if first.startswith("# ") else ""


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> Iterator[Block]:
    text = text_of(page)
    assert text.count("\n```") % 2 == 0, f"{page}: a fence is not closed"
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M):
        if found[1] == language:
            yield Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2])


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)


# ---------------------------------------------------------------------- examples that are files

FILES = ("writing-a-pass.md", "writing-a-kernel.md", "adding-a-family.md")
CONFTEST = """\
import sparsevila_compile.families as families
import sparsevila_compile.kernels as kernels
import sparsevila_compile.passes as passes
kernels.__path__.append({folder!r} + "/kernels")
passes.__path__.append({folder!r} + "/passes")
import sparsevila_compile.passes.square_as_product
entry = eval({entry!r}, vars(families))
families.FAMILIES[entry.model_type] = entry
"""


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Writes the documented files where their packages find them, and runs the documented tests.

    In a process of its own, which ends as it began: they register passes, ops and a family. It
    runs while the other tests of this file do.
    """
    folder = tmp_path_factory.mktemp("documented")
    entry = ""
    for block in (b for page in FILES for b in blocks(page, "python")):
        if re.fullmatch(r"(passes|kernels|tests)/[\w/]+\.py", block.title):
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
        else:
            assert block.title == "in the tuple FAMILIES of sparsevila_compile/families.py"
            entry = block.code.partition("\n")[2].strip()
    (folder / "conftest.py").write_text(CONFTEST.format(folder=str(folder), entry=entry))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
    ]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q"]
    command += ["--junitxml", str(folder / "results.xml"), str(folder / "tests")]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running.folder = folder  # type: ignore[attr-defined]
    yield running
    if running.poll() is None:
        running.kill()
        running.wait()


# ---------------------------------------------------------------------- examples of the runtime


def test_runtime_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its blocks, in order, on a tiny checkpoint, without the network."""
    from tests import tiny_checkpoint

    tiny_checkpoint.write(tmp_path / "checkpoint")
    for seed, name in enumerate(("cards.png", "street.png"), 1):
        tiny_checkpoint.picture(tmp_path / name, seed)
    [recipe] = [b for b in blocks("runtime.md", "yaml") if b.title == "recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text(recipe.code)
    calls: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: calls.append(address))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks("runtime.md", "python"):
        # Padded, so that a traceback shows the page's own line numbers.
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, f"docs/{block.page}", "exec"), names)
        ran += 1
    assert ran >= 7
    assert names["model"].program.prune is not None
    assert calls == []


# ---------------------------------------------------------------------- the page of passes


def table_of_passes() -> str:
    import sparsevila_compile.passes  # noqa: F401  (registers them)
    from sparsevila_compile.pass_base import PASSES
    from sparsevila_compile.program import STAGES

    lines = ["| pass | stage | what it does | options |", "|---|---|---|---|"]
    for kind in sorted(PASSES.values(), key=lambda k: (STAGES.index(k.stage), k.name)):
        options = [
            f"**`{name}`**" if field.is_required() else f"`{name}`"
            for name, field in kind.config_type.model_fields.items()
            if name != "optional"
        ]
        summary = kind.summary + ("; repeats" if kind.repeatable else "")
        lines.append(f"| `{kind.name}` | {kind.stage} | {summary} | {', '.join(options)} |")
    return "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end -->"


def test_table_of_passes() -> None:
    [found] = GENERATED.findall(text_of("passes.md"))
    assert found == table_of_passes(), "run: python tests/test_docs.py --write"


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text_of(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_pass_has_its_section() -> None:
    from sparsevila_compile.pass_base import PASSES

    assert sorted(sections("passes.md")) == sorted(PASSES)


def _pass_items() -> list[tuple[str, str]]:
    return [(name, body) for name, body in sections("passes.md").items()]


@pytest.mark.parametrize("name, body", _pass_items(), ids=lambda v: v if len(v) < 40 else "")
def test_example_items_of_passes(name: str, body: str) -> None:
    from sparsevila_compile.pass_base import PASSES

    found = re.findall(r"^```yaml\n(.*?)^```$", body, re.S | re.M)
    items = [item for code in found for item in yaml.safe_load(code)]
    assert items
    for item in items:
        [(named, options)] = item.items() if isinstance(item, dict) else [(item, None)]
        assert named == name
        PASSES[name].config_type(**(options or {}))


@cache
def messages_of(path: Path) -> str:
    """A module's text constants, one a line; … stands for what f-strings fill in."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            lines.append(
                "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


@pytest.mark.parametrize("name, body", _pass_items(), ids=lambda v: v if len(v) < 40 else "")
def test_misses_and_errors_of_passes(name: str, body: str) -> None:
    said = messages_of(ROOT / "passes" / f"{name}.py")
    quoted = re.findall(r'^- (?:miss|error): "(.+?)"', body, re.M)
    assert len(quoted) == len(re.findall(r"^- (?:miss|error):", body, re.M))
    for message in quoted:
        assert message in said, f"{name} does not say {message!r}"


# ---------------------------------------------------------------------- the page of families


def test_fields_of_families() -> None:
    from sparsevila_compile.families import Family, Modality

    page = text_of("adding-a-family.md")
    for kind in (Family, Modality):
        table = page.partition(f"| field of `{kind.__name__}` |")[2].partition("\n\n")[0]
        listed = re.findall(r"^\| `(\w+)` \|", table, re.M)
        assert listed == [f.name for f in fields(kind)]


def test_refusals_of_families() -> None:
    package = ROOT / "sparsevila_compile"
    sources = [package / "families.py", package / "trace.py", *(package / "hf").glob("*.py")]
    said = "\n".join(map(messages_of, sources))
    table = sections("adding-a-family.md")["What is refused, and why"]
    quoted = re.findall(r'^\| "(.+?)" \|', table, re.M)
    assert len(quoted) >= 8
    for message in quoted:
        assert message in said, f"nothing says {message!r}"


# ---------------------------------------------------------------------- dependencies

IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "onnxruntime-gpu": "onnxruntime"}
COME_ALONG = {"numpy", "jinja2", "sympy"}


def _requirements() -> tuple[list[str], list[str]]:
    """Names of what it takes to run, and to build and test."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run = project["project"]["dependencies"]
    rest = project["build-system"]["requires"]
    rest += [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    run, rest = ([re.match(r"[\w.-]+", r)[0] for r in rs] for rs in (run, rest))  # type: ignore[index]
    return run, rest


def _rows(section: str) -> dict[str, str]:
    return dict(
        re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", sections("dependencies.md")[section], re.M)
    )


def test_dependencies_are_those_of_the_project() -> None:
    run, rest = _requirements()
    assert sorted(_rows("To run")) == sorted(run)
    assert sorted(_rows("To build and test")) == sorted(rest)


@cache
def _imported() -> set[str]:
    """Top-level names of what the package imports."""
    found: set[str] = set()
    files = [
        p for d in ("sparsevila_compile", "passes", "kernels") for p in (ROOT / d).rglob("*.py")
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                found.add(str(ast.literal_eval(node.args[0])).partition(".")[0])
    return found


def test_dependencies_are_imported_as_said() -> None:
    rows = _rows("To run")
    for name, why in rows.items():
        imported = IMPORT_NAMES.get(name, name) in _imported()
        assert imported == ("Not imported yet" not in why), name
    ours = {"sparsevila_compile", *COME_ALONG, *(IMPORT_NAMES.get(n, n) for n in rows)}
    assert _imported() - set(sys.stdlib_module_names) <= ours


# ---------------------------------------------------------------------- names

ARTIFACT_FILES = {
    "processor/",
    "artifact.json",
    "bundle.json",
    "recipe.json",
    "report.json",
    "generation_config.json",
}
EXAMPLE_FILES = {"recipe.yaml", "recipe.schema.json", "config.json"}
PLACES = ("", "sparsevila_compile", "kernels", "passes", "docs", "tests")


def _inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", [p.name for p in PAGES])
def test_named_files_exist(page: str) -> None:
    for code in _inline_code(page):
        for name in re.findall(r"(?<![\w/.*-])[\w./-]+\.(?:py|md|toml|txt|yaml|json)\b", code):
            found = any((ROOT / place / name).is_file() for place in PLACES)
            assert found or name in ARTIFACT_FILES | EXAMPLE_FILES, f"{page}: there is no {name}"
        if re.fullmatch(r"[\w./-]+/", code):
            found = any((ROOT / place / code).is_dir() for place in PLACES)
            assert found or code in ARTIFACT_FILES, f"{page}: there is no {code}"


@cache
def _classes() -> dict[str, set[str]]:
    """Attributes and methods of the package's classes."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "sparsevila_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members = found.setdefault(node.name, set())
                for part in ast.walk(node):
                    if isinstance(part, ast.FunctionDef):
                        members.add(part.name)
                    elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        members.add(part.target.id)
    return found


@pytest.mark.parametrize("page", [p.name for p in PAGES])
def test_named_members_exist(page: str) -> None:
    for code in _inline_code(page):
        if found := re.fullmatch(r"([A-Z]\w+)\.(\w+)(\(.*\))?", code):
            assert found[2] in _classes().get(found[1], set()), f"{page}: there is no {code}"


# ---------------------------------------------------------------------- last: the one that waits


def test_documented_files(examples: subprocess.Popen[str]) -> None:
    """The documented pass, kernel and family pass the documented tests, all of them."""
    output, _ = examples.communicate(timeout=300)
    assert examples.returncode == 0, output
    folder: Path = examples.folder  # type: ignore[attr-defined]
    cases = ElementTree.parse(folder / "results.xml").iter("testcase")
    ran = {str(c.get("name")).partition("[")[0] for c in cases if not list(c)}
    code = "".join(p.read_text() for p in (folder / "tests").rglob("test_*.py"))
    assert ran == set(re.findall(r"^def (test_\w+)", code, re.M))
    assert len(ran) >= 8


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_docs.py --write")
    page = DOCS / "passes.md"
    page.write_text(GENERATED.sub(lambda _: table_of_passes(), page.read_text(encoding="utf-8")))
