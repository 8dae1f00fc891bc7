"""The same equalities on a CUDA device, where Triton's kernels run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.model import CompiledModel
from sparsevila_compile.trace import trace
from tests import tiny
from tests.tiny import Image, words

pytestmark = pytest.mark.gpu

PROMPTS: dict[str, list[tiny.Row]] = {
    "one": [[Image(1), *words(6)]],
    "three": [
        [Image(1), *words(3)],
        [*words(20), Image(2, (6, 4)), *words(2), Image(3, (4, 10)), 44],
        [Image(4, (2, 4)), *words(9, 3)],
    ],
}


def _compiled(name: str, *specs: tiny.Spec) -> tuple[Any, CompiledModel, set[str]]:
    """transformers' model and the compiled one, both on the GPU, and the kernels bound."""
    model = tiny.build(name).to("cuda")
    program = trace(model)
    reports = tiny.run(program, *specs)
    bound = {f"{k.split('/')[0]}: {v}" for k, v in reports[-1].implementations.items()}
    return model, CompiledModel(program, None, model.generation_config), bound


@pytest.mark.parametrize("recipe", [tiny.DENSE, tiny.FULL], ids=["cache", "full"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_greedy_equals_transformers(name: str, kind: str, recipe: tuple[tiny.Spec, ...]) -> None:
    model, compiled, bound = _compiled(name, *recipe)
    assert "language: triton" in bound, "the cache was to run on Triton"
    prompt = {k: v.cuda() for k, v in tiny.inputs(name, PROMPTS[kind]).items()}
    expected = model.generate(**prompt, **tiny.greedy(64))
    assert compiled.generate(**prompt, **tiny.greedy(64)).tolist() == expected.tolist()


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_sparse_tokens_equal_the_cpu(name: str) -> None:
    """Pruning and retrieval choose the same tokens with Triton's kernels as with the CPU's."""
    specs: tuple[tiny.Spec, ...] = (
        ("prune_visual_tokens", {"keep_ratio": 0.5}),
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.4, "share": "kv_head", "when": "always"}),
    )
    _, on_gpu, bound = _compiled(name, *specs)
    assert {"turn: triton", "decode: triton", "vision: triton"} <= bound
    prompt = tiny.inputs(name, PROMPTS["three"])
    out = on_gpu.generate(**{k: v.cuda() for k, v in prompt.items()}, **tiny.greedy(48))
    assert (
        out.cpu().tolist()
        == tiny.compiled(name, *specs).generate(**prompt, **tiny.greedy(48)).tolist()
    )


def test_conversation_on_gpu() -> None:
    """Three turns over one cache, the second with a new picture."""
    model, compiled, _ = _compiled("llava", *tiny.FULL)
    conversation = compiled.conversation(1)
    row: list[Any] = [Image(1), *words(5)]
    for more in ([Image(2), *words(4, 1)], words(6, 2), None):
        prompt = {k: v.cuda() for k, v in tiny.inputs("llava", [row]).items()}
        expected = model.generate(**prompt, **tiny.greedy(16))
        out = compiled.generate(conversation=conversation, **prompt, **tiny.greedy(16))
        assert out.tolist() == expected.tolist()
        if more is not None:
            answer = expected[0, prompt["input_ids"].shape[1] :].tolist()
            row = tiny.continued(row, answer, *more)
    assert compiled.usage.cached_tokens > 0


def test_bfloat16_stays_close() -> None:
    """bf16 logits of the compiled model are as far from fp32 as transformers' own bf16 logits."""
    exact = tiny.build("llava").to("cuda")
    prompt = {k: v.cuda() for k, v in tiny.inputs("llava", PROMPTS["one"]).items()}
    with torch.no_grad():
        reference = exact(**prompt).logits[:, -1].float()
        half = tiny.build("llava").to("cuda").to(torch.bfloat16)
        eager = half(**prompt).logits[:, -1].float()
        program = trace(half)
    tiny.run(program, *tiny.FULL)
    compiled = CompiledModel(program, None, half.generation_config)
    rows = compiled.reader.read(prompt)
    logits, _ = compiled.conversation(1)._feed(rows, None, 4)
    scale = reference.norm()
    assert (logits.float() - reference).norm() / scale <= 2 * (eager - reference).norm() / scale


def _watched(model: CompiledModel) -> list[str]:
    """Names of the components that the engine runs, in order; a graph's replays run none."""
    ran: list[str] = []
    real = model.engine.run

    def run(name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        ran.append(name)
        return real(name, inputs)

    model.engine.run = run  # type: ignore[method-assign]
    return ran


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_decode_is_one_graph_whatever_the_length(name: str) -> None:
    """40 tokens of three ragged rows, then a second turn: captured once, replayed for the rest."""
    specs: tuple[tiny.Spec, ...] = (
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.4, "when": "always"}),
    )
    _, compiled, _ = _compiled(name, *specs)
    conversation = compiled.conversation(3)
    ran = _watched(compiled)
    prompt = {k: v.cuda() for k, v in tiny.inputs(name, PROMPTS["three"]).items()}
    out = compiled.generate(conversation=conversation, **prompt, **tiny.greedy(40))
    decoder = conversation._decoder
    assert decoder is not None
    assert out.shape[1] == prompt["input_ids"].shape[1] + 40
    # Twice each: the run that loads kernels, and the captured one.
    assert ran.count("decode") == 2
    assert decoder.captures == 1
    new = prompt["input_ids"].shape[1]
    rows = [
        tiny.continued(row, answer, *words(4, i))
        for i, (row, answer) in enumerate(zip(PROMPTS["three"], out[:, new:].tolist(), strict=True))
    ]
    again = {k: v.cuda() for k, v in tiny.inputs(name, rows).items()}
    compiled.generate(conversation=conversation, **again, **tiny.greedy(40))
    assert decoder.captures <= 2  # the cache grew, which moves it


def test_no_wait_in_the_loop_but_the_stop_check() -> None:
    """Synchronising calls of a long answer's loop: none beyond the flag that says who goes on."""
    _, compiled, _ = _compiled("llava", *tiny.DENSE)
    conversation = compiled.conversation(1)
    prompt = {k: v.cuda() for k, v in tiny.inputs("llava", PROMPTS["one"]).items()}
    compiled.generate(conversation=conversation, **prompt, **tiny.greedy(8))
    decoder = conversation._decoder
    assert decoder is not None
    decoder.alive.fill_(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            decoder.step(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_small_cache_is_decoded_densely_and_that_is_said() -> None:
    """With ``when: pays``, the answer is then the dense one."""
    specs: tuple[tiny.Spec, ...] = (
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.1}),
    )
    model, compiled, _ = _compiled("llava", *specs)
    ran = _watched(compiled)
    prompt = {k: v.cuda() for k, v in tiny.inputs("llava", PROMPTS["one"]).items()}
    expected = model.generate(**prompt, **tiny.greedy(16))
    assert compiled.generate(**prompt, **tiny.greedy(16)).tolist() == expected.tolist()
    assert not {"turn", "decode", "retrieve"} & set(ran)
    assert compiled.usage.dense_because is not None
    assert compiled.usage.attended_visual == compiled.usage.cached_visual
