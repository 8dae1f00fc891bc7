"""Training's parts at toy size: every stage steps, states resume, losses measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.cards import model as vlm
from examples.cards.average import main as average
from examples.cards.batches import Batch
from examples.cards.foretelling import Watch, foretelling_loss, make_watchable, watched
from examples.cards.render import PATCHES
from examples.cards.settings import parse
from examples.cards.targets import NONE, NOTES, make_targets
from examples.cards.train import Trainer
from examples.cards.train import main as train_main
from examples.cards.world import Samples, fixed_set

CPU = torch.device("cpu")
TOY = ["--tiny", "--device", "cpu", "--batch", "4", "--chunk", "2", "--validation", "4"]


@pytest.fixture(scope="module")
def drawn() -> Samples:
    return fixed_set(6, 4_242, CPU)


@pytest.fixture(scope="module")
def tiny() -> vlm.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return vlm.build(vlm.TINY_SIZES).eval()


def toy_trainer(folder: Path, *more: str) -> Trainer:
    places = ["--state", str(folder / "state.pt"), "--out", str(folder / "model")]
    return Trainer(parse([*TOY, *places, *more], None))


def copied(trainer: Trainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def moved(trainer: Trainer, before: dict[str, Tensor], part: str) -> bool:
    now = trainer.model.state_dict()
    return any(part in k and not torch.equal(v, now[k]) for k, v in before.items())


def test_stages_train_what_they_should(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "--warmup", "1", "--drop-share", "0")
    whole = 60 * trainer.settings.minutes
    for stage, seconds in ((1, 0.0), (2, 0.5 * whole), (3, 0.9 * whole)):
        trainer.seconds = seconds
        before = copied(trainer)
        loss, lr = trainer.step()
        assert trainer.stage == stage
        assert torch.isfinite(loss)
        assert lr > 0
        assert moved(trainer, before, "vision_tower") == (stage == 1)
        assert moved(trainer, before, "language_model.layers") == (stage > 1)
        assert moved(trainer, before, "multi_modal_projector")


def test_loss_falls_on_one_batch(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "--warmup", "1")
    world = trainer.world.samples(4, torch.Generator().manual_seed(1))
    losses = []
    for _ in range(12):
        trainer.queue = [world]
        losses.append(trainer.step()[0].item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_state_resumes(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path)
    first.step()
    first.seconds = 300.0
    first.save()
    second = toy_trainer(tmp_path)
    assert not all(torch.equal(v, first.model.state_dict()[k]) for k, v in copied(second).items())
    second.begin()
    assert (second.steps, second.stage, second.seconds) == (1, 1, 300.0)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    for key, value in first.heads.state_dict().items():
        assert torch.equal(value, second.heads.state_dict()[key]), key
    old, new = (t.optimizer.state_dict()["state"] for t in (first, second))
    assert old.keys() == new.keys()
    assert old, "the optimizer has no state"
    assert [run["steps"] for run in second.runs] == [1]
    second.step()
    assert second.steps == 2
    second.save()
    third = toy_trainer(tmp_path)
    third.begin()
    assert [run["steps"] for run in third.runs] == [1, 2]


def test_a_state_of_other_sizes_is_refused(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    state = trainer.state() | {"sizes": vlm.SIZES}
    with pytest.raises(SystemExit, match="made with sizes"):
        trainer.restore(state)


def test_the_command_trains_exports_and_warm_starts(tmp_path: Path) -> None:
    places = ["--state", str(tmp_path / "state.pt"), "--out", str(tmp_path / "model")]
    assert train_main([*TOY, *places, "--minutes", "0.03", "--log-seconds", "0.5"])
    written = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"config.json", "training_heads.safetensors", "training.json"} <= written
    again = vlm.load(tmp_path / "model", CPU, torch.float32)
    trainer = toy_trainer(tmp_path / "new", "--warm-start", str(tmp_path / "model"))
    trainer.begin()
    assert trainer.seconds > 1.0
    for key, value in again.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key]), key


def test_targets_say_what_is_there(drawn: Samples) -> None:
    notes = make_targets(drawn).notes
    letter = notes[:, :, list(NOTES).index("letter")]
    row = notes[:, :, list(NOTES).index("row")]
    left = notes[:, :, list(NOTES).index("left")]
    assert torch.equal(letter == NONE, row == NONE)
    for i in range(len(drawn)):
        cards = drawn.scenes.listed(i)
        assert len(letter[i][letter[i] != NONE].unique()) == len(cards)
        beside = [
            c
            for c in cards
            if any(d["row"] == c["row"] and int(d["column"]) < int(c["column"]) for d in cards)
        ]
        at = letter[i][left[i] != NONE].unique()
        assert len(at) == len(beside)


def test_dropped_tokens_keep_their_positions(
    drawn: Samples, tiny: vlm.LlavaForConditionalGeneration
) -> None:
    """Keeping all tokens explicitly equals not dropping; keeping some equals masking the others."""
    text = drawn.dialogues.trimmed().text[:2]
    visual = torch.randn(2, PATCHES, tiny.config.text_config.hidden_size)
    every = torch.arange(PATCHES).expand(2, -1)
    with torch.no_grad():
        dense = vlm.text_logits(tiny, visual, text)
        same = vlm.text_logits(tiny, visual, text, every)
        kept = vlm.text_logits(tiny, visual, text, every[:, ::4])
        compact = vlm.text_logits(tiny, visual, text, every[:, ::4], compact=True)
    torch.testing.assert_close(same, dense, atol=1e-5, rtol=1e-4)
    assert (kept - dense).norm() / dense.norm() > 1e-3
    assert (kept - compact).norm() / dense.norm() > 1e-4
    decoder = tiny.model.language_model
    x = torch.cat(
        [
            decoder.embed_tokens(torch.ones_like(text[:, :1])),
            visual,
            decoder.embed_tokens(text),
        ],
        1,
    )
    length = x.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = torch.ones(length, dtype=torch.bool)
    hidden[1 : 1 + PATCHES] = False
    hidden[1 + every[0, ::4]] = True
    mask &= hidden[None, :] | torch.eye(length, dtype=torch.bool)
    with torch.no_grad():
        out = decoder(
            inputs_embeds=x,
            attention_mask=mask.expand(2, 1, -1, -1),
            position_ids=torch.arange(length).expand(2, -1),
            use_cache=False,
        )
        masked = tiny.lm_head(out.last_hidden_state[:, -text.shape[1] :])
    torch.testing.assert_close(kept, masked, atol=1e-5, rtol=1e-4)


def test_watching_changes_nothing_and_sees_softmax(drawn: Samples) -> None:
    torch.manual_seed(0)
    model = vlm.build(vlm.TINY_SIZES).eval()
    text = drawn.dialogues.trimmed().text[:2]
    visual = torch.randn(2, PATCHES, model.config.text_config.hidden_size)
    with torch.no_grad():
        plain = vlm.text_logits(model, visual, text)
        make_watchable(model)
        with watched(drawn.dialogues.trimmed()[:2]) as watch:
            seen = vlm.text_logits(model, visual, text)
        unwatched = vlm.text_logits(model, visual, text)
    torch.testing.assert_close(seen, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(seen, unwatched)
    assert len(watch.layers) == vlm.TINY_SIZES["text_layers"]
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        decoder = model.model.language_model
        start = decoder.embed_tokens(torch.ones_like(text[:, :1]))
        x = torch.cat([start, visual, decoder.embed_tokens(text)], 1)
        truth = decoder(inputs_embeds=x, output_attentions=True, use_cache=False).attentions
    for mine, theirs in zip(watch.layers, truth, strict=True):
        want = theirs[:, :, -text.shape[1] :, 1 : 1 + PATCHES].mean(1)
        assert want.sum() > 1
        torch.testing.assert_close(mine, want, atol=1e-6, rtol=1e-3)


def test_foretelling_is_zero_only_where_question_and_answer_agree(drawn: Samples) -> None:
    talk = drawn.dialogues.trimmed()
    n, t = talk.text.shape
    there = torch.zeros(n, t, PATCHES)
    there[:, :, 7] = 0.5
    assert foretelling_loss(Watch(*talk.rows(), None, [there])).abs() < 1e-5
    elsewhere = there.clone()
    elsewhere[talk.is_answer] = 0.0
    elsewhere[:, :, 9] = torch.where(talk.is_answer, 0.5, 0.0)
    assert foretelling_loss(Watch(*talk.rows(), None, [elsewhere])) > 5
    assert foretelling_loss(Watch(*talk.rows(), None, [there, elsewhere])) > 2.5


def test_foretelling_teaches_the_question_alone(drawn: Samples) -> None:
    talk = drawn.dialogues.trimmed()
    n, t = talk.text.shape
    g = torch.Generator().manual_seed(3)
    weights = torch.softmax(torch.randn(n, t, PATCHES, generator=g), -1).requires_grad_()
    foretelling_loss(Watch(*talk.rows(), None, [weights])).backward()
    assert weights.grad is not None
    taught = weights.grad.abs().sum(-1) > 0
    assert not taught[talk.is_answer].any()
    assert torch.equal(taught, ~talk.is_answer & (talk.turn >= 0))


def test_an_average_lies_between(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        torch.manual_seed(i)
        vlm.export(vlm.build(vlm.TINY_SIZES), folder)
        vlm.write_json(folder / "training.json", {"steps": i, "runs": [i]})
    average([*map(str, folders), "--share", "0.25", "--out", str(tmp_path / "c")])
    first, second, mean = (
        vlm.load(f, CPU, torch.float32).state_dict() for f in (*folders, tmp_path / "c")
    )
    for key, value in mean.items():
        want = 0.75 * first[key] + 0.25 * second[key]
        torch.testing.assert_close(value, want, atol=1e-6, rtol=1e-2)  # stored in bf16
    assert any(not torch.equal(first[k], mean[k]) for k in mean)
    report = json.loads((tmp_path / "c" / "training.json").read_text())
    assert report["runs"] == [1]
    assert report["averaged"] == [{"steps": 0, "share": 0.75}, {"steps": 1, "share": 0.25}]


def test_batches_cut_and_join(drawn: Samples) -> None:
    halves = [drawn[:2], drawn[2:]]
    joined: Batch = Samples.cat(halves)
    assert len(joined) == len(drawn) == 6
    assert torch.equal(joined.dialogues.text, drawn.dialogues.text)
    assert torch.equal(joined.scenes.cell, drawn.scenes.cell)
