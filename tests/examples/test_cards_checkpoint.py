"""The released checkpoint: plain Hugging Face form, small, answers, and a fair test subject."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples.cards import make_data, release
from examples.cards import model as vlm
from examples.cards import sparsity_study as study
from examples.cards.processor import CHAT_TEMPLATE
from examples.cards.render import PATCHES
from examples.cards.scoring import by_type, exact_turns
from examples.cards.vocabulary import BOS, EOS, IMAGE, PAD, TYPES, spell
from examples.cards.world import TURNS, Samples, fixed_set

CPU = torch.device("cpu")
CARDS = Path(make_data.__file__).parent
CHECKPOINT = CARDS / "checkpoint"
FRESH_SEED = 8_080_808  # no other set's


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Iterator[LlavaForConditionalGeneration]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(2, before)))
    yield LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    torch.set_num_threads(before)


def report(name: str) -> dict[str, Any]:
    return json.loads((CHECKPOINT / name).read_text())


def answers(
    model: LlavaForConditionalGeneration,
    processor: Any,
    pictures: list[Image.Image],
    questions: list[list[str]],
) -> list[list[str]]:
    """Greedy answers turn by turn, as chats through the processor; own answers in the history."""
    chats: list[list[dict[str, Any]]] = [[] for _ in pictures]
    said: list[list[str]] = [[] for _ in pictures]
    for turn in range(len(questions[0])):
        for i, chat in enumerate(chats):
            content: list[dict[str, str]] = [{"type": "text", "text": questions[i][turn]}]
            if turn == 0:
                content.insert(0, {"type": "image"})
            chat.append({"role": "user", "content": content})
        prompts = [
            processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False)
            for c in chats
        ]
        inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        for i, answer in enumerate(processor.batch_decode(new, skip_special_tokens=True)):
            said[i].append(answer)
            content = [{"type": "text", "text": answer}]
            chats[i].append({"role": "assistant", "content": content})
    return said


def test_files_are_plain_and_small() -> None:
    files = sorted(CHECKPOINT.iterdir())
    assert sum(f.stat().st_size for f in files) <= 25_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert not any("heads" in f.name for f in files)
    assert (CHECKPOINT / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_config_names_the_special_tokens(model: LlavaForConditionalGeneration) -> None:
    for config in (model.config, model.generation_config, model.config.text_config):
        told = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
        assert told == (PAD, BOS, EOS)
    assert model.config.image_token_id == IMAGE


def test_processor_gives_the_training_format(processor: Any) -> None:
    drawn = fixed_set(3, 71, CPU)
    for i in range(3):
        chat = make_data.messages(drawn.dialogues, i)
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        picture = make_data.picture(drawn, i)
        out = processor(text=[prompt], images=[picture], return_tensors="pt")
        text = [t for t in drawn.dialogues.text[i].tolist() if t != PAD]
        assert out["input_ids"][0].tolist() == [BOS, *[IMAGE] * PATCHES, *text]
        want = vlm.normalised(drawn.pictures[i : i + 1])
        torch.testing.assert_close(out["pixel_values"], want, atol=1e-6, rtol=0)
    ids = processor.tokenizer("it is red </s>")["input_ids"]
    assert ids[-1] == EOS
    assert processor.decode(ids, skip_special_tokens=True) == "it is red"
    assert spell(processor.tokenizer("what colour is card B?")["input_ids"]).endswith("B ?")


def test_an_unknown_role_is_refused(processor: Any) -> None:
    chat = [{"role": "system", "content": "be brief"}]
    with pytest.raises(Exception, match="user and assistant only"):
        processor.apply_chat_template(chat, tokenize=False)


def test_quickstart_dialogues_are_answered(
    model: LlavaForConditionalGeneration, processor: Any
) -> None:
    lines = (CARDS / "quickstart" / "dialogues.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    pictures = [Image.open(CARDS / "quickstart" / e["image"]) for e in entries]
    questions = [[t["question"] for t in e["turns"]] for e in entries]
    truth = [[t["answer"] for t in e["turns"]] for e in entries]
    assert len(entries) == 4
    assert answers(model, processor, pictures, questions) == truth


@pytest.mark.slow
def test_forty_fresh_dialogues(model: LlavaForConditionalGeneration, processor: Any) -> None:
    drawn = fixed_set(40, FRESH_SEED, CPU)
    told = [make_data.turns(drawn.dialogues, i) for i in range(40)]
    pictures = [make_data.picture(drawn, i) for i in range(40)]
    said = answers(model, processor, pictures, [[t["question"] for t in d] for d in told])
    right = [
        a == t["answer"]
        for d, own in zip(told, said, strict=True)
        for t, a in zip(d, own, strict=True)
    ]
    assert len(right) == 40 * TURNS
    assert sum(right) / len(right) >= 0.9, [
        (t["question"], t["answer"], a)
        for d, own in zip(told, said, strict=True)
        for t, a in zip(d, own, strict=True)
        if a != t["answer"]
    ]


@pytest.fixture(scope="module")
def fresh() -> Samples:
    drawn = fixed_set(24, FRESH_SEED + 1, CPU)
    drawn.dialogues = drawn.dialogues.trimmed()
    return drawn


@pytest.mark.slow
def test_pruning_by_the_class_token_is_mild_and_chance_is_not(
    model: LlavaForConditionalGeneration, fresh: Samples
) -> None:
    """24 dialogues: a margin of six points allows for chance; the reports hold the real figures."""
    text, right = fresh.dialogues.text, {}
    with torch.inference_mode():
        features, _ = vlm.see(model, vlm.normalised(fresh.pictures))
        visual = vlm.project(model, features)
        scores = study.saliences(model, fresh, torch.Generator().manual_seed(5))
        for name in ("class token, last layer", "random"):
            kept = scores[name].topk(PATCHES // 4, 1).indices.sort(1).values
            logits = vlm.text_logits(model, visual, text, kept)
            right[name] = by_type(exact_turns(logits, fresh.dialogues), fresh.dialogues)["all"]
        dense = vlm.text_logits(model, visual, text)
        whole = by_type(exact_turns(dense, fresh.dialogues), fresh.dialogues)["all"]
    assert whole - right["class token, last layer"] <= 4 + 6
    assert whole - right["random"] >= 10 - 6
    assert right["class token, last layer"] > right["random"]


@pytest.mark.slow
def test_retrieval_is_mild_and_beats_chance(
    model: LlavaForConditionalGeneration, fresh: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RETRIEVE_SHARES", (0.1,))
    rows = {(r["method"], r["first_too"]): r["all"] for r in study.retrieval(model, fresh, 15)}
    lost = rows["dense", False] - rows["question rows", False]
    assert lost <= 5 + 6
    assert rows["question rows", False] > rows["random", False]
    assert rows["random", False] > rows["nothing", False]


def test_reported_scores_are_those_asked_for() -> None:
    scores = report("evaluation.json")
    assert scores["dialogues"] >= 1000
    assert scores["generate"]["all"] >= 95
    assert all(scores["generate"][t] >= 90 for t in TYPES)
    assert scores["answers_of_several_tokens"] > 100 / 3
    found = report("sparsity.json")
    pruned = {(r["method"], r["kept"], r["positions"]): r["all"] for r in found["pruning"]}
    dense = pruned["dense", 1.0, "-"]
    assert dense - pruned["class token, last layer", 0.25, "original"] <= 4
    assert dense - pruned["random", 0.25, "original"] >= 10
    kept = {(r["method"], r["kept"]): r["all"] for r in found["retrieval"] if not r["first_too"]}
    assert kept["dense", 1.0] - kept["question rows", 0.1] <= 5
    assert kept["question rows", 0.1] > kept["random", 0.1]


def test_the_card_tells_the_reports() -> None:
    assert (CHECKPOINT / "README.md").read_text() == release.write_card(CHECKPOINT)
    assert "@" not in (CHECKPOINT / "README.md").read_text()


def test_quickstart_and_calibration_data_regenerate(tmp_path: Path) -> None:
    """The same files, lines and pixels; PNG packing alone may differ with Pillow."""
    make_data.main(["--out", str(tmp_path)])
    for name in ("quickstart", "calibration"):
        made, kept = (sorted(p.name for p in (f / name).iterdir()) for f in (tmp_path, CARDS))
        assert made == kept
        for file in made:
            new, old = tmp_path / name / file, CARDS / name / file
            if file.endswith(".png"):
                with Image.open(new) as a, Image.open(old) as b:
                    assert a.size == b.size == (224, 224)
                    assert a.tobytes() == b.tobytes()
            else:
                assert new.read_bytes() == old.read_bytes()
    whole = sum(p.stat().st_size for p in (CARDS / "calibration").iterdir())
    assert whole <= 4_000_000
    assert len(list((CARDS / "calibration").glob("*.png"))) == make_data.CALIBRATION
