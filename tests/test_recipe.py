"""The recipe loader: places, suggestions, all mistakes at once, and never another exception."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsevila_compile.errors import UserError
from sparsevila_compile.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from sparsevila_compile.recipe_schema import recipe_schema, recipe_tables
from sparsevila_compile.yaml_position import parse_yaml

ROOT = Path(__file__).resolve().parent.parent

GOOD = """\
version: 1
model:
  path: checkpoint
  dtype: float32
  device: cpu
passes:
  - prune_visual_tokens: {keep_ratio: 0.25}
  - insert_kv_cache
  - sparsify_decode_attention:
      keep_ratio: 0.10
      layers: [0, 1]
emit: {format: module, path: ../out/x, overwrite: true}
ask:
  max_new_tokens: 16
  pictures:
    - image: 0.png
      turns:
        - {question: "how many ?", answer: 3}
        - {question: "is it red ?", answer: no}
"""


def load(tmp_path: Path, text: str | bytes) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(file)


def errors(tmp_path: Path, text: str | bytes) -> list[str]:
    """The error lines without the file's name."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    lines = str(caught.value).split("\n")
    name = f"{tmp_path / 'r.yaml'}:"
    assert all(line.startswith(name) for line in lines)
    return [line.removeprefix(name) for line in lines]


def replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert [p.name for p in recipe.passes] == [
        "prune_visual_tokens",
        "insert_kv_cache",
        "sparsify_decode_attention",
    ]
    assert recipe.passes[0].config.model_dump()["keep_ratio"] == 0.25
    assert recipe.passes[2].config.model_dump()["layers"] == (0, 1)
    assert recipe.ask is not None
    # YAML 1.2: `no` is a word; a number is fine where an answer is wanted.
    assert [t.answer for t in recipe.ask.pictures[0].turns] == ["3", "no"]
    assert recipe.model.trust_remote_code is False


def test_relative_paths_start_at_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "r.yaml"
    file.write_text(replaced("path: checkpoint", "path: ./checkpoint"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("sub/r.yaml")
    assert recipe.checkpoint() == str(tmp_path / "sub" / "checkpoint")
    assert recipe.resolve(recipe.emit.path) == tmp_path / "out" / "x"
    assert recipe.resolve("~/a") == tmp_path / "home" / "a"
    resolved = recipe.resolved()
    assert resolved["emit"]["path"] == str(tmp_path / "out" / "x")
    assert resolved["ask"]["pictures"][0]["image"] == str(tmp_path / "sub" / "0.png")


def test_what_is_a_hub_id(tmp_path: Path) -> None:
    text = replaced("path: checkpoint", "path: org/name")
    recipe = load(tmp_path, text)
    assert recipe.is_hub_id()
    assert recipe.checkpoint() == "org/name"
    (tmp_path / "org").mkdir()  # now org/name is a misspelt directory, not something to download
    assert load(tmp_path, text).checkpoint() == str(tmp_path / "org" / "name")
    for path in ("name", "./org/name", "a/b/c", "org/", "/org/name", "~/org"):
        assert not load(tmp_path, replaced("path: checkpoint", f"path: {path}")).is_hub_id()


def test_the_resolved_recipe_loads_again(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    resolved = recipe.resolved()
    json.dumps(resolved)
    again = recipe_from_dict(resolved, tmp_path / "elsewhere")
    assert again.resolved() == resolved
    assert again.passes == recipe.passes


@pytest.mark.parametrize(
    "old, new, place, words",
    [
        ("keep_ratio: 0.25", "keep_ration: 0.25", "7:27", ["keep_ration", "did you mean keep_ratio?"]),
        ("keep_ratio: 0.25", "keep_ratio: 0", "7:27", ["keep_ratio: must be greater than 0, not 0"]),
        ("keep_ratio: 0.25", "keep_ratio: 1.5", "7:27", ["less than or equal to 1, not 1.5"]),
        ("keep_ratio: 0.25", "keep_ratio: .nan", "7:39", ["keep_ratio: must be a finite number"]),
        ("keep_ratio: 0.25", "keep_ratio: '0.25'", "7:27", ["must be a number, not '0.25'"]),
        ("keep_ratio: 0.25", "keep_ratio: true", "7:27", ["must be a number, not true"]),
        ("keep_ratio: 0.25", "keep_ratio: [0.25]", "7:27", ["must be a number, not a list"]),
        ("keep_ratio: 0.10", "keep_ratio: 25%", "10:7", ["keep_ratio: must be a number, not '25%'"]),
        ("keep_ratio: 0.10", "keep_ratio: 0.1\n      share: head", "11:7", ["share: must be one of layer, kv_head"]),
        ("layers: [0, 1]", "layers: [0, x]", "11:19", ["layers[1]: must be an integer, not 'x'"]),
        ("insert_kv_cache", "insert_kvcache", "8:5", ["passes[1]", "did you mean insert_kv_cache?"]),
        ("insert_kv_cache", "frobnicate", "8:5", ["there is no pass 'frobnicate'; there are "]),
        ("insert_kv_cache", "insert_kv_cache: 3", "8:5", ["options must be a mapping, not 3"]),
        ("insert_kv_cache", "3", "8:5", ["must be a pass or {pass: {options}}, not 3"]),
        ("dtype: float32", "dtype: fp32", "4:3", ["model.dtype: must be one of auto, float32"]),
        ("dtype: float32", "dtyp: float32", "4:3", ["model.dtyp: unknown key, did you mean dtype?"]),
        ("dtype: float32", "zzz: 1", "4:3", ["unknown key; the keys here are path, dtype"]),
        ("device: cpu", "device: gpu", "5:3", ["model.device: must be auto, cpu, cuda or cuda:N"]),
        ("path: checkpoint", "path: ''", "3:3", ["model.path: must not be empty"]),
        ("path: checkpoint", "path: 3", "3:3", ["model.path: must be a string, not 3"]),
        ("path: checkpoint", 'path: "a\\0b"', "3:3", ["model.path: holds a NUL character"]),
        ("path: checkpoint", "path: ~nobody-here/x", "3:3", ["there is no such user"]),
        ("overwrite: true", "overwrite: yes", "12:40", ["must be a boolean, not 'yes'"]),
        ("overwrite: true", "path: y", "12:40", ["emit.path: is given twice (first in line 12)"]),
        ("format: module", "format: onx", "12:8", ["emit.format: must be one of module"]),
        ("max_new_tokens: 16", "max_new_tokens: 0", "14:3", ["greater than or equal to 1, not 0"]),
        ("max_new_tokens: 16", "max_new_tokens: 1.5", "14:3", ["an integer, not 1.5"]),
        ("max_new_tokens: 16", "file: x.jsonl", "14:3", ["ask.file: and pictures are both given"]),
        ("image: 0.png", "img: 0.png", "16:7", ["pictures[0].img: unknown key, did you mean image?"]),
        ("version: 1", "version: 2", "1:1", ["version: must be 1, not 2"]),
        ("version: 1", "version: '1'", "1:1", ["version: must be 1, not '1'"]),
        ("version: 1", "version: true", "1:1", ["version: must be 1, not true"]),
        ("version: 1", "verison: 1", "1:1", ["verison: unknown key, did you mean version?"]),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line_at_its_place(
    tmp_path: Path, old: str, new: str, place: str, words: list[str]
) -> None:
    (line,) = errors(tmp_path, replaced(old, new))
    assert line.startswith(f"{place} "), line
    for word in words:
        assert word in line


def test_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("dtype", "dtpye").replace("0.25", "7").replace("0.10", "-1")
    text = text.replace("image:", "imag:") + "extra: 1\n"
    lines = errors(tmp_path, text)
    assert [line.split(":")[0] for line in lines] == ["4", "7", "10", "16", "20"]


@pytest.mark.parametrize(
    "order, index, words",
    [
        (["insert_kv_cache", "prune_visual_tokens"], 1, "is listed after insert_kv_cache"),
        (["insert_kv_cache", "insert_kv_cache"], 1, "is listed twice"),
        (["lower_ops", "insert_kv_cache"], 1, "is listed after lower_ops"),
    ],
)
def test_order_of_passes(tmp_path: Path, order: list[str], index: int, words: str) -> None:
    options = {"prune_visual_tokens": "{keep_ratio: 0.5}"}
    listed = "".join(f"  - {p}: {options.get(p, '')}\n" for p in order)
    head, tail = GOOD.split("passes:\n")[0], GOOD[GOOD.index("emit:") :]
    (line,) = errors(tmp_path, f"{head}passes:\n{listed}{tail}")
    assert line.startswith(f"{7 + index}:5 passes[{index}].{order[index]}: ")
    assert words in line


@pytest.mark.parametrize("key", ["version", "model", "passes", "emit"])
def test_what_is_required(tmp_path: Path, key: str) -> None:
    data = parse_yaml(GOOD).data
    del data[key]
    lines = errors(tmp_path, yaml.safe_dump(data))
    assert lines == [
        f"1:1 {key}: is required" + (": the list of passes to run" * (key == "passes"))
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- 1\n- 2\n", "must be a mapping with the keys version, model"),
        (b"just words", "must be a mapping"),
        (b"a: 1\n---\nb: 2\n", "2:1 a second document starts here"),
        (b"a: \xff\xfe", "1:4 is not UTF-8 text (byte 0xff)"),
        ("a: ü".encode("utf-16"), "1:1 is not UTF-8"),
        (b"a:\n\t- b\n", "2:1 a tab where YAML wants spaces"),
        (b"a: [1, 2\n", "2:1 is not valid YAML"),
        (b"a: \x01", "1:4 holds the character U+0001"),
        (b"a: *b", "1:4 is not valid YAML: found undefined alias 'b'"),
        (b"model: !!python/object/apply:os.system [id]", "1:8 model: has the tag"),
        (b"? [a]\n: 1", "has a list or mapping as a key"),
        (b"&a [*a]", "is an alias of something that contains it"),
        (b"[" * 100_000, "is nested deeper than 30 levels"),
        (b'a: "\\UFFFFFFFF"', "is not valid YAML"),
        (b'a: "\\uD800"', "lone surrogate"),
        (b"a: " + b"9" * 5000, "is a number of 5000 characters"),
        (b"#" * 300_000, "is larger than 256 KiB"),
    ],
)
def test_what_is_no_recipe_at_all(tmp_path: Path, text: bytes, words: str) -> None:
    lines = errors(tmp_path, text)
    assert any(words in line for line in lines), lines


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="there is no such file"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe("/dev/zero")


def test_an_alias_bomb_ends_soon(tmp_path: Path) -> None:
    lists = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    merges = ["a0: &a0 {b: 1}"]
    for i in range(1, 40):
        lists.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
        merges.append(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}")
    start = time.perf_counter()
    assert "values (aliases?)" in errors(tmp_path, "\n".join(lists))[0]
    assert any("merges too much" in line for line in errors(tmp_path, "\n".join(merges)))
    assert time.perf_counter() - start < 10


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = replaced("{keep_ratio: 0.25}", "&k {keep_ratio: 0.25}")
    text = text.replace(
        "sparsify_decode_attention:\n      keep_ratio: 0.10",
        "sparsify_decode_attention:\n      <<: *k",
    )
    assert load(tmp_path, text).passes[2].config.model_dump()["keep_ratio"] == 0.25
    wrong = text.replace("0.25", "2")
    lines = errors(tmp_path, wrong)  # two passes are wrong, both at the anchor's place
    assert [line.split(" ")[0] for line in lines] == ["7:30", "7:30"]
    assert "passes[0]" in lines[0]
    assert "passes[2]" in lines[1]


def test_a_pass_error_lands_on_its_option(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    for message, place in (
        ("layers: 9 is outside", "11:7 passes[2].sparsify_decode_attention.layers: 9 is outside"),
        ("matches nothing", "9:5 passes[2].sparsify_decode_attention: matches nothing"),
    ):
        error = UserError(message)
        error.index = 2  # type: ignore[attr-defined]
        with pytest.raises(RecipeError) as caught, recipe.blame("passes"):
            raise error
        assert str(caught.value) == f"{recipe.file}:{place}"


# ------------------------------------------------------------------ properties

WORDS = [
    "version", "model", "path", "passes", "emit", "ask", "keep_ratio", "optional", "layers", "file",
    "prune_visual_tokens", "insert_kv_cache", "quantize_linear", "lower_ops", "<<", "", "a.b", "ü",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([0.5, 1, 0, "auto", "cpu", "1e-3", "~", "~x", "no", "\0", "\ud800", "x" * 300]),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=4),
    ),
    max_leaves=8,
)


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = data.items() if isinstance(data, dict) else enumerate(data)
    out = []
    for key, value in items:
        out.append((*path, key))
        if isinstance(value, (dict, list)):
            out += _places(value, (*path, key))
    return out


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good recipe with keys deleted, renamed, doubled up or swapped for other things."""
    data = parse_yaml(GOOD).data
    for _ in range(draw(st.integers(1, 4))):
        places = _places(data)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        holder = data
        for part in path:
            holder = holder[part]
        action = draw(st.sampled_from(["delete", "rename", "swap", "repeat"]))
        if action == "swap":
            holder[key] = draw(VALUES)
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == "rename" and isinstance(holder, dict):
            name = draw(st.one_of(st.sampled_from(WORDS), st.just(f"{key}x"), st.text(max_size=5)))
            holder[name] = holder.pop(key)
        else:
            del holder[key]
    return yaml.safe_dump(data, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def scribbled(draw: st.DrawFn) -> bytes:
    """A good recipe's bytes with pieces cut out, doubled or written over."""
    data = bytearray(GOOD.encode())
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        piece = st.sampled_from(
            [b"", b"\t", b"\n", b" ", b"- ", b"{", b"]", b"*a", b"&a ", b"'", b'"', b"\xff", b"\0",
             b"!!int ", b"? ", b"<<: ", b"|", b"%", b"---\n", b"...\n", b"1e999", b"\xef\xbb\xbf"]
        )  # fmt: skip
        data[start:end] = draw(st.one_of(piece, st.just(bytes(data[start:end]) * 2)))
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def _check_outcome(folder: Path, data: bytes) -> None:
    file = folder / "p.yaml"
    file.write_bytes(data)
    try:
        recipe = load_recipe(file)
    except UserError as error:
        lines = str(error).split("\n")
        assert lines
        for line in lines:
            head, _, rest = line.partition(" ")
            assert line.startswith(f"{file}:")
            assert rest.strip()
            assert rest.isprintable()
            number, column = head.removeprefix(f"{file}:").split(":")
            assert int(number) >= 1
            assert int(column) >= 1
        return
    assert isinstance(recipe, Recipe)
    json.dumps(recipe.resolved())


QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@given(data=mutated())
@QUICK
def test_mutated_recipes_load_or_are_refused_in_words(folder: Path, data: bytes) -> None:
    _check_outcome(folder, data)


@given(data=scribbled())
@QUICK
def test_scribbled_recipes_load_or_are_refused_in_words(folder: Path, data: bytes) -> None:
    _check_outcome(folder, data)


@given(data=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass"))))  # fmt: skip
@QUICK
def test_random_bytes_are_refused_in_words(folder: Path, data: bytes) -> None:
    _check_outcome(folder, data)


def test_the_unmutated_recipe_is_good(folder: Path) -> None:
    """Or the tests above would only ever see one refusal."""
    (folder / "good.yaml").write_text(GOOD)
    load_recipe(folder / "good.yaml")


# ------------------------------------------------------------------ schema and documentation


def test_the_schema_knows_every_pass_and_option() -> None:
    from sparsevila_compile.pass_base import PASSES

    schema = recipe_schema()
    json.dumps(schema)
    (options,) = (s for s in schema["properties"]["passes"]["items"]["anyOf"] if "properties" in s)
    assert set(options["properties"]) == set(PASSES)
    for name, kind in PASSES.items():
        shape = options["properties"][name]
        refs = [s["$ref"] for s in (shape, *shape.get("anyOf", ())) if "$ref" in s]
        definition = schema["$defs"][refs[0].removeprefix("#/$defs/")]
        assert set(definition["properties"]) == set(kind.config_type.model_fields)
        assert definition["additionalProperties"] is False
    assert set(schema["required"]) == {"version", "model", "emit", "passes"}
    text = json.dumps(schema)
    for ref in set(_refs(schema)):
        assert ref.removeprefix("#/$defs/") in schema["$defs"], ref
    assert "keep_ratio" in text


def _refs(data: Any) -> list[str]:
    if isinstance(data, dict):
        own = [data["$ref"]] if isinstance(data.get("$ref"), str) else []
        return own + [r for v in data.values() for r in _refs(v)]
    return [r for v in data for r in _refs(v)] if isinstance(data, list) else []


def test_the_documentation_has_every_key() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    start, end = "<!-- tables: made by `sparsevila-compile schema --markdown` -->", "<!-- end -->"
    held = text[text.index(start) + len(start) : text.index(end)]
    assert held.strip() == recipe_tables().strip(), (
        "docs/recipe.md is behind: put the output of `sparsevila-compile schema --markdown` there"
    )


def test_the_documentation_s_example_loads(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    recipe = load(tmp_path, example)
    assert recipe.ask is not None
    assert len(recipe.passes) >= 3
