"""Models whose linears another package holds in AWQ's layout, behind ``backend="sparsevila"``.

:class:`Foreign` has the tensors and attributes of GPTQModel's ``AWQuantLinear`` (and, but for the
name ``w_bit``, of AutoAWQ's ``WQLinear_GEMM``), and a forward of its own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevila_compile import dynamo, hf
from sparsevila_compile.dynamo.backend_report import BackendWarning
from sparsevila_compile.errors import UserError
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.trace import trace
from tests import awq_checkpoint, tiny
from tests.awq_checkpoint import GROUP, PLACES
from tests.dynamo import models
from tests.tiny import Image, Video, words

ROWS: dict[str, list[tiny.Row]] = {
    "llava": [[*words(3), Image(1), *words(8, 1)]],
    "qwen": [[Image(1), *words(2), Video(2, (2, 6, 4), 0.5), *words(4, 2)]],
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Compiled code of one model serves every other of its shape; these differ in more."""
    torch._dynamo.reset()


class Foreign(torch.nn.Module):
    """Dequantizes at every call, as GPTQModel's ``AwqTorchLinear`` does."""

    def __init__(self, linear: torch.nn.Linear, packed: awq_checkpoint.Packed) -> None:
        super().__init__()
        self.bits, self.group_size = 4, GROUP
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor.clone())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)

    def weight(self) -> torch.Tensor:
        """``[K, N]``."""

        def unpacked(held: torch.Tensor) -> torch.Tensor:
            values = (held[..., None] >> torch.arange(0, 32, 4)) & 15
            return values[..., [PLACES.index(c) for c in range(8)]].flatten(1)

        zeros = unpacked(self.qzeros).repeat_interleave(self.group_size, 0)
        scales = self.scales.float().repeat_interleave(self.group_size, 0)
        return (unpacked(self.qweight) - zeros) * scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x @ self.weight()
        return out if self.bias is None else out + self.bias


class Breaking(Foreign):
    """Calls what Dynamo cannot trace, as kernels of extensions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class PackingAnew(Foreign):
    """Lays its codes out anew at the first call, as GPTQModel's ``TorchAtenAwqLinear`` does."""

    ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.qweight = self.weight()
            self.ready = True
        out = x @ self.qweight
        return out if self.bias is None else out + self.bias


def foreign(name: str, kind: type[Foreign] = Foreign) -> Any:
    """A tiny model as another package would load the checkpoint."""
    model = tiny.build(name)
    for path, linear in awq_checkpoint.linears(model).items():
        model.set_submodule(path, kind(linear, awq_checkpoint.packed(name)[path]))
    model.config.quantization_config = dict(awq_checkpoint.CONFIG)
    return model


def compiled(model: Any, *specs: tiny.Spec, **options: Any) -> Any:
    recipe = {"passes": models.passes(specs or (*tiny.FULL, "merge_linears"))}
    model.compile(backend="sparsevila", options={"recipe": recipe, "inner": "eager", **options})
    return model


def answers(model: Any, name: str) -> list[list[int]]:
    found = []
    for row in ROWS[name]:
        found += models.ask(model, tiny.inputs(name, [row]))
    return found


def reference(name: str) -> list[list[int]]:
    return answers(awq_checkpoint.reference(name), name)


def held_bytes(model: Any) -> int:
    linears = [model.get_submodule(path) for path in awq_checkpoint.packed("llava")]
    names = ("qweight", "qzeros", "scales")
    tensors = [getattr(linear, part) for linear in linears for part in names]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind", [("llava", Foreign), ("qwen", Foreign), ("llava", PackingAnew)]
)
def test_linears_of_another_package_are_taken_over(name: str, kind: type[Foreign]) -> None:
    expected = reference(name)
    assert answers(foreign(name, kind), name) == expected, "the stand-in for the package is wrong"
    model = foreign(name, kind)
    theirs = [weakref.ref(m) for m in model.modules() if isinstance(m, Foreign)]
    before = held_bytes(model)
    compiled(model, strict=True)
    assert answers(model, name) == expected
    report = dynamo.report(model)
    assert {p.name: len(p.matches) for p in report.passes}["repack_awq"] == len(theirs) == 14
    assert not report.not_done
    assert 2 <= report.graphs <= 1 + 3
    if name == "llava":  # a forward outside of generate finds Qwen's positions by itself
        prompt = tiny.inputs(name, ROWS[name][:1])
        logits = model(**prompt, logits_to_keep=1).logits
        wanted = awq_checkpoint.reference(name)(**prompt, logits_to_keep=1).logits
        assert float((logits - wanted).abs().max() / wanted.abs().max()) < 1e-5
    gc.collect()
    assert not [r for r in theirs if r() is not None], "the other package's modules stay in memory"
    assert report.freed_bytes >= before
    assert held_bytes(model) < before / 20
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert layer.scales.isnan().all(), "what is left could pass for weights"
    with pytest.raises(UserError, match="cannot be saved"):
        model.state_dict()


@pytest.mark.slow
def test_a_checkpoint_needs_no_other_package(tmp_path: Path) -> None:
    model = dynamo.load_awq(awq_checkpoint.write(tmp_path, "qwen"))
    assert answers(model, "qwen") == reference("qwen")
    assert answers(compiled(model, strict=True), "qwen") == reference("qwen")
    plain = tmp_path / "plain"
    tiny.model("llava").save_pretrained(plain)
    with pytest.raises(UserError, match="is not quantized; load it with from_pretrained"):
        dynamo.load_awq(plain)


@pytest.mark.slow
def test_sparse_tokens_are_the_artifacts() -> None:
    program = trace(awq_checkpoint.reference("llava"))
    tiny.run(program, *models.SPARSE)
    settings = tiny.model("llava").generation_config
    expected = answers(CompiledModel(program, tiny.processor(), settings), "llava")
    assert expected != reference("llava"), "nothing was sparse"
    assert answers(compiled(foreign("llava"), *models.SPARSE), "llava") == expected


@pytest.mark.slow
def test_quantize_linear_is_left_out() -> None:
    rtn = ("quantize_linear", {"method": "rtn", "group_size": 32})
    model = compiled(foreign("llava"), *tiny.FULL, rtn)
    with pytest.warns(
        BackendWarning, match="quantize_linear: not applied: the 14 language linears"
    ):
        assert answers(model, "llava") == reference("llava")


# ---------------------------------------------------------------------- what cannot be taken over


class OtherLayout(Foreign):
    """As many words in another shape, as Marlin's."""

    def __init__(self, linear: torch.nn.Linear, packed: awq_checkpoint.Packed) -> None:
        super().__init__(linear, packed)
        self.qweight = self.qweight.view(self.in_features // 16, 2 * self.out_features)

    def weight(self) -> torch.Tensor:
        self.qweight = self.qweight.view(self.in_features, -1)
        found = super().weight()
        self.qweight = self.qweight.view(self.in_features // 16, -1)
        return found


@pytest.mark.slow
def test_another_layout_is_said_and_left_alone() -> None:
    said = r"AwqConfig\(backend='torch_awq'\)"
    model = compiled(foreign("llava", OtherLayout))
    with pytest.warns(BackendWarning, match=said):
        assert answers(model, "llava") == reference("llava")
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, OtherLayout)
    strict = compiled(foreign("llava", OtherLayout), strict=True)
    with pytest.raises(UserError, match=said) as caught:
        answers(strict, "llava")
    assert "\n" not in str(caught.value)


def _bits(model: Any) -> None:
    model.model.language_model.layers[1].mlp.up_proj.bits = 8


def _adapter(model: Any) -> None:
    model.model.language_model.layers[1].mlp.up_proj.adapter = torch.nn.Identity()


def _gptq(model: Any) -> None:
    model.config.quantization_config["quant_method"] = "gptq"


def _gemv(model: Any) -> None:
    model.config.quantization_config["version"] = "gemv"


def _features(model: Any) -> None:
    model.model.language_model.layers[1].mlp.up_proj.out_features = 64


def _no_zeros(model: Any) -> None:
    del model.model.language_model.layers[1].mlp.up_proj.qzeros


UNFIT: dict[str, tuple[Callable[[Any], None], str]] = {
    "8 bits": (_bits, r"up_proj \(Foreign\): is no linear in AWQ's 4 bits"),
    "no zero points": (_no_zeros, r"up_proj \(Foreign\): is no linear in AWQ's 4 bits"),
    "an adapter": (_adapter, "has an adapter"),
    "other features": (_features, "it maps 64 to 64 features"),
    "gptq": (_gptq, "quant_method is 'gptq'"),
    "gemv": (_gemv, "version is 'gemv'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_and_left_alone(case: str) -> None:
    change, said = UNFIT[case]
    model = foreign("llava")
    change(model)
    with pytest.raises(UserError, match=said) as caught:
        hf.adopt_awq(model)
    assert "\n" not in str(caught.value)
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, Foreign)


def test_what_says_awq_and_is_not() -> None:
    model = tiny.build("llava")
    model.config.quantization_config = dict(awq_checkpoint.CONFIG)
    with pytest.raises(UserError, match="no module of it holds a qweight"):
        trace(model)


@pytest.mark.slow
def test_kernels_that_break_the_graph_run_on() -> None:
    """The model stays as it was, with its package's kernels, and the way out is said."""
    name = "llava"
    model = compiled(foreign(name, Breaking))
    with pytest.warns(BackendWarning, match="not applied: .*; load it by .*dynamo.load_awq"):
        assert answers(model, name) == reference(name)
    assert all(isinstance(model.get_submodule(p), Breaking) for p in awq_checkpoint.packed(name))
    assert len(dynamo.report(model).not_done) == 4


@pytest.mark.slow
def test_what_was_compiled_for_another_model_is_not_taken_for_this_one() -> None:
    """Both have one shape, so Dynamo runs the first one's code for the second too."""
    for strict in (False, True):
        torch._dynamo.reset()
        first, second = foreign("llava"), foreign("llava")
        _adapter(first)
        compiled(first, strict=strict)
        compiled(second, strict=strict)
        if strict:
            for model, said in ((first, "has an adapter"), (second, "_dynamo.reset")):
                with pytest.raises(UserError, match=said):
                    answers(model, "llava")
            continue
        with pytest.warns(BackendWarning, match="has an adapter"):
            answers(first, "llava")
        with pytest.warns(BackendWarning, match="_dynamo.reset"):
            assert answers(second, "llava") == reference("llava")


def test_a_trace_sees_only_what_was_taken_over() -> None:
    model = foreign("llava")
    with pytest.raises(UserError, match="which cannot be traced"):
        trace(model)
    assert len(hf.adopt_awq(model)) == 14
    assert not hf.adopt_awq(model)
    trace(model)
