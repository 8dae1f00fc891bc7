"""Prompts: pictures found and placed; bad ones are refused in one line, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sparsevila_compile.errors import UserError
from sparsevila_compile.prompt import compact_positions
from tests import tiny
from tests.e2e.reference import Dialogue, Prune
from tests.tiny import Image, Row, Video, words

Prompt = dict[str, Any]


def good(name: str) -> Prompt:
    pictures: list[tiny.Item] = [Image(1), *words(3), Image(2, (6, 4)), *words(4, 1)]
    return dict(tiny.inputs(name, [pictures]))


def refusal(name: str, prompt: Prompt, **arguments: Any) -> str:
    """The message for a bad request; nothing must have been run."""
    model = tiny.compiled(name, *tiny.FULL)
    ran: list[str] = []
    real = model.engine.run
    model.engine.run = lambda n, i: (ran.append(n), real(n, i))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        with pytest.raises(UserError) as caught:
            model.generate(**prompt, **{**tiny.greedy(4), **arguments})
    finally:
        del model.engine.run  # type: ignore[method-assign]
    assert ran == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- placeholders and pictures


def _drop_placeholders(prompt: Prompt, count: int, token: int = tiny.IMAGE) -> None:
    """Take away the last ``count`` placeholders."""
    keep = torch.ones_like(prompt["input_ids"], dtype=torch.bool)
    for i in (prompt["input_ids"][0] == token).nonzero()[:, 0].tolist()[-count:]:
        keep[0, i] = False
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in prompt:
            prompt[key] = prompt[key][keep][None]


def _extra_run(prompt: Prompt) -> None:
    run = torch.full((1, 24), tiny.IMAGE)
    prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[50]]), run], 1)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    prompt.pop("mm_token_type_ids", None)


def _split_run(prompt: Prompt) -> None:
    at = int((prompt["input_ids"][0] == tiny.IMAGE).nonzero()[3])
    prompt["input_ids"][0, at] = 50


LLAVA: dict[str, tuple[Callable[[Prompt], Any], str]] = {
    "more placeholders": (_extra_run, "more placeholders than images: token 4[0-9] of the prompt"),
    "no pictures": (lambda p: p.pop("pixel_values"), "more placeholders than images: token 1 "),
    "fewer placeholders": (lambda p: _drop_placeholders(p, 16), "1 more images than placeholders"),
    "no placeholders": (
        lambda p: p.update(input_ids=torch.tensor([words(5)]), attention_mask=None),
        "2 more images than placeholders.*one placeholder for each image",
    ),
    "short run": (
        lambda p: _drop_placeholders(p, 3),
        "image needs 16 placeholders, the prompt has 13 at token .*let the processor expand",
    ),
    "split run": (_split_run, "image needs 16 placeholders, the prompt has 3 at token 1"),
    "wrong size": (
        lambda p: p.update(pixel_values=torch.zeros(2, 3, 28, 56)),
        r"pixel_values are \(28, 56\) pixels; the encoder takes 56 × 56",
    ),
    "wrong channels": (
        lambda p: p.update(pixel_values=torch.zeros(2, 1, 56, 56)),
        "pixel_values.*1 channel.*3",
    ),
    "three dims": (
        lambda p: p.update(pixel_values=torch.zeros(3, 56, 56)),
        r"pixel_values must be \[pictures, channels, height, width\]",
    ),
    "a list": (lambda p: p.update(pixel_values=[1, 2]), "pixel_values must be a .*tensor.*list"),
    "integers": (
        lambda p: p.update(pixel_values=torch.zeros(2, 3, 56, 56, dtype=torch.uint8)),
        "pixel_values must be a .*floating.*uint8",
    ),
}


@pytest.mark.parametrize("case", LLAVA)
def test_llava(case: str) -> None:
    change, message = LLAVA[case]
    prompt = good("llava")
    change(prompt)
    _matches(message, refusal("llava", prompt))


def _matches(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern, text), text


QWEN: dict[str, tuple[Callable[[Prompt], Any], str]] = {
    "more placeholders": (_extra_run, "more placeholders than images"),
    "fewer placeholders": (lambda p: _drop_placeholders(p, 6), "1 more images than placeholders"),
    "short run": (
        lambda p: _drop_placeholders(p, 2),
        "image needs 6 placeholders, the prompt has 4",
    ),
    "no grid": (lambda p: p.pop("image_grid_thw"), "pixel_values came without image_grid_thw"),
    "other grid": (
        lambda p: p.update(image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 4]])),
        "image_grid_thw describes 40 patches, pixel_values holds 48",
    ),
    "too large a grid": (
        lambda p: p.update(image_grid_thw=torch.tensor([[1, 4, 6], [1, 40, 6]])),
        "image_grid_thw describes 264 patches, pixel_values holds 48",
    ),
    "grid of two": (
        lambda p: p.update(image_grid_thw=torch.tensor([[4, 6], [6, 4]])),
        r"image_grid_thw must be \[pictures, 3\]",
    ),
    "odd grid": (
        lambda p: p.update(image_grid_thw=torch.tensor([[1, 3, 8], [1, 6, 4]])),
        r"image_grid_thw.*\(1, 3, 8\).*multiple",
    ),
    "empty grid": (
        lambda p: p.update(image_grid_thw=torch.tensor([[1, 4, 6], [1, 6, 4], [0, 4, 4]])),
        r"image_grid_thw.*\(0, 4, 4\)",
    ),
    "negative grid": (
        lambda p: p.update(image_grid_thw=torch.tensor([[1, 4, 6], [1, -6, -4]])),
        r"image_grid_thw.*\(1, -6, -4\)",
    ),
    "narrow patches": (
        lambda p: p.update(pixel_values=torch.zeros(48, 588)),
        r"1176 values a patch, not \(48, 588\)",
    ),
    "one dim": (lambda p: p.update(pixel_values=torch.zeros(48)), "pixel_values"),
    "grid that is a list": (
        lambda p: p.update(image_grid_thw=[[1, 4, 6], [1, 6, 4]]),
        "image_grid_thw must be a .*tensor.*list",
    ),
}


@pytest.mark.parametrize("case", QWEN)
def test_qwen(case: str) -> None:
    change, message = QWEN[case]
    prompt = good("qwen")
    change(prompt)
    _matches(message, refusal("qwen", prompt))


def test_pictures_that_touch() -> None:
    """Two pictures of this family without a token between them would be read as one."""
    prompt = dict(tiny.inputs("qwen", [[Image(1, (4, 4)), Image(2, (4, 4))]]))
    ids = prompt["input_ids"]
    inside = (ids == tiny.VISION_END) | (ids == tiny.VISION_START)
    inside[0, 1], inside[0, -1] = False, False
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        prompt[key] = prompt[key][~inside][None]
    _matches("side by side without a token between", refusal("qwen", prompt))


def test_seconds_of_videos() -> None:
    row: Row = [Video(1), *words(2), Video(2), *words(2)]
    prompt = dict(tiny.inputs("qwen", [row]))
    prompt["second_per_grid_ts"] = torch.tensor([1.0])
    _matches("second_per_grid_ts has 1 entries for 2 videos", refusal("qwen", prompt))
    prompt["second_per_grid_ts"] = torch.tensor([1.0, 1.0, 2.0])
    _matches("second_per_grid_ts has 3 entries for 2 videos", refusal("qwen", prompt))
    model = tiny.compiled("qwen", *tiny.FULL)
    outputs = []
    for seconds in (None, torch.tensor([1.0, 1.0]), [1.0, 1.0]):
        prompt["second_per_grid_ts"] = seconds
        outputs.append(model.generate(**prompt, **tiny.greedy(6)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


# ---------------------------------------------------------------------- ids and masks

IDS: dict[str, tuple[Prompt, str]] = {
    "none": ({}, r"input_ids must be a tensor \[batch, length\]"),
    "a list": ({"input_ids": [[1, 2]]}, "input_ids must be a tensor"),
    "one dim": ({"input_ids": torch.tensor([1, 20])}, "input_ids must be a tensor"),
    "empty": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    "floats": ({"input_ids": torch.tensor([[1.0, 20.0]])}, "input_ids must be .*integers.*float32"),
    "above the vocabulary": (
        {"input_ids": torch.tensor([[1, 120]])},
        "holds 120.*vocabulary has 120",
    ),
    "negative": ({"input_ids": torch.tensor([[1, -1]])}, "holds -1"),
    "mask of another shape": (
        {"input_ids": torch.tensor([[1, 20]]), "attention_mask": torch.ones(1, 3)},
        r"attention_mask has the shape \(1, 3\), input_ids \(1, 2\)",
    ),
    "empty row": (
        {
            "input_ids": torch.tensor([[1, 20], [0, 0]]),
            "attention_mask": torch.tensor([[1, 1], [0, 0]]),
        },
        "row 1 of the batch has no tokens",
    ),
    "unknown input": (
        {"input_ids": torch.tensor([[1, 20]]), "pixel_value": torch.zeros(1)},
        "unknown arguments pixel_value",
    ),
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_ids(name: str, case: str) -> None:
    prompt, message = IDS[case]
    _matches(message, refusal(name, dict(prompt)))


def test_padding_may_hold_anything() -> None:
    """Tokens that the mask hides are not looked at, not even placeholders."""
    model = tiny.compiled("llava", *tiny.FULL)
    row: Row = [Image(1), *words(4)]
    plain = tiny.inputs("llava", [row])
    prompt = dict(plain)
    for junk in ([3, 3], [tiny.IMAGE, tiny.IMAGE], [500, -7]):
        prompt["input_ids"] = torch.cat([torch.tensor([junk]), plain["input_ids"]], 1)
        mask = torch.ones_like(prompt["input_ids"])
        mask[0, :2] = 0
        prompt["attention_mask"] = mask
        out = model.generate(**prompt, **tiny.greedy(8))
        assert tiny.answers_of(prompt, out) == tiny.dense_rows("llava", [row], 8)


def test_ids_between_the_vocabulary_and_the_placeholder() -> None:
    """A placeholder outside the embedding table is fine; another id out there is not."""
    from sparsevila_compile.model import CompiledModel

    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache")
    program.config = {**program.config, "image_token_id": 1000, "image_token_index": 1000}
    model = CompiledModel(program, tiny.processor(), tiny.model("llava").generation_config)
    row: Row = [Image(1), *words(4)]
    prompt = dict(tiny.inputs("llava", [row]))
    ids = prompt["input_ids"].clone()
    prompt["input_ids"] = torch.where(ids == tiny.IMAGE, 1000, ids)
    out = model.generate(**prompt, **tiny.greedy(8))
    assert tiny.answers_of(prompt, out) == tiny.dense_rows("llava", [row], 8)
    prompt["input_ids"][0, -1] = 500
    with pytest.raises(UserError, match="holds 500, but the vocabulary has 120"):
        model.generate(**prompt, **tiny.greedy(8))


# ---------------------------------------------------------------------- arguments of generate

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"max_new_token": 4}, "unknown arguments max_new_token"),
    "two unknown": ({"foo": 1, "bar": 2}, "unknown arguments bar, foo"),
    "beams": ({"num_beams": 3}, "num_beams=3 is not supported"),
    "several answers": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    "dictionary": ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
    "scores": ({"output_scores": True}, "output_scores=True"),
    "attentions": ({"output_attentions": True}, "unknown arguments output_attentions"),
    "hidden states": ({"output_hidden_states": True}, "unknown arguments output_hidden_states"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha|top_k"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "layers": ({"dola_layers": "high"}, "dola_layers='high' is not supported"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens|max_length"),
    "negative": ({"max_new_tokens": -3}, "max_new_tokens|max_length"),
    "short max_length": (
        {"max_new_tokens": None, "max_length": 10},
        "max_length=10 leaves no room after a prompt of",
    ),
    "stop strings": ({"stop_strings": 7}, "stop_strings"),
    "temperature": ({"do_sample": True, "temperature": -1.0}, "temperature"),
    "own cache": ({"past_key_values": object()}, "unknown arguments past_key_values"),
    "own embeddings": ({"inputs_embeds": torch.zeros(1, 3, 64)}, "unknown arguments inputs_embeds"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    _matches(message, refusal("llava", good("llava"), **arguments))


def test_longer_than_the_cache() -> None:
    model = tiny.compiled("llava", ("insert_kv_cache", {"max_length": 60}))
    prompt = good("llava")
    length = prompt["input_ids"].shape[1]
    with pytest.raises(UserError, match=rf"needs {length + 40} cache positions.*limit is 60"):
        model.generate(**prompt, **tiny.greedy(40))
    assert model.generate(**prompt, **tiny.greedy(60 - length)).shape[1] == 60
    with pytest.raises(UserError, match="raise max_length of insert_kv_cache"):
        model.generate(**prompt, **tiny.greedy(60 - length + 1))


def test_pruned_tokens_need_no_cache() -> None:
    specs = (("prune_visual_tokens", {"keep_ratio": 0.25}), ("insert_kv_cache", {"max_length": 60}))
    prompt = good("llava")
    length = prompt["input_ids"].shape[1]
    kept = length - 2 * 12
    assert length + 10 < 60
    model = tiny.compiled("llava", *specs)
    model.generate(**prompt, **tiny.greedy(60 - kept))
    with pytest.raises(UserError, match=r"needs 61 cache positions"):
        model.generate(**prompt, **tiny.greedy(60 - kept + 1))


def test_defaults() -> None:
    """Without a length there is one; a config that has its own is taken as it is."""
    model = tiny.compiled("llava", *tiny.FULL)
    prompt = good("llava")
    length = prompt["input_ids"].shape[1]
    assert model.generate(**prompt, do_sample=False).shape[1] == length + 256
    own = GenerationConfig(max_new_tokens=7, do_sample=False)
    assert model.generate(**prompt, generation_config=own).shape[1] == length + 7
    bare = GenerationConfig(do_sample=False)
    assert model.generate(**prompt, generation_config=bare).shape[1] > length
    longer = model.generate(**prompt, generation_config=bare, max_new_tokens=9)
    assert longer.shape[1] == length + 9
    assert own.max_length != length + 7, "the caller's object is not changed"


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("mode", ["original", "compact"])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_positions(name: str, mode: str, ratio: float) -> None:
    """Against the reference, over pictures, videos and text of every order."""
    rows: list[Row] = [
        [Image(1), *words(3), Image(2, (6, 10)), 33],
        [*words(4), Image(3, (2, 2)), Image(4, (8, 6))],
        words(5),
    ]
    if name == "qwen":
        rows += [
            [*words(3), Video(1, (5, 4, 6), 3.0), *words(3), Image(1), *words(2)],
            [Image(1), Video(2, (2, 4, 4), 0.5), *words(2), Video(3, (3, 2, 8), 1.0), 44],
        ]
    prune = Prune(ratio, positions=mode)
    model = tiny.compiled(name, prune.spec(), "insert_kv_cache")
    for row in rows:
        reference = Dialogue(name, prune)
        reference.feed(row)
        conversation = model.conversation()
        read = model.reader.read(tiny.inputs(name, [row]))
        feeds, _ = conversation._lay_out(read, [0], [read[0].pictures], None)
        axes = 3 if name == "qwen" else 1
        expected = torch.tensor(reference.positions).T[:axes]
        assert torch.equal(feeds[0].positions, expected)
        assert conversation.rows[0].next == reference.cursor
        assert (feeds[0].visual >= 0).tolist() == reference.visual


def test_compact_positions_by_hand() -> None:
    from sparsevila_compile.families import IMAGE
    from sparsevila_compile.prompt import Picture

    # text, a picture of 2 × 3 of which (0,0), (0,2), (1,2) stay, text
    grid = torch.tensor([[5, 5, 5, 5, 5, 5], [5, 5, 5, 6, 6, 6], [5, 6, 7, 5, 6, 7]])
    text = torch.tensor([[4], [4], [4]])
    positions = torch.cat([text, grid, torch.tensor([[8, 9]] * 3)], 1)
    kept = torch.tensor([True, True, False, True, False, False, True, True, True])
    picture = Picture(IMAGE, 1, 6, 1, torch.empty(0), (1, 4, 6), b"")
    got = compact_positions(positions, kept, [picture], 10)
    assert got.tolist() == [
        [10, 11, 11, 11, 13, 14],
        [10, 11, 11, 12, 13, 14],
        [10, 11, 12, 12, 13, 14],
    ]
