"""Models whose linears AWQ tools have quantized: the checkpoint's own, and those of other packages.

transformers loads such checkpoints through GPTQModel, which most machines lack and which repacks
weights for kernels of its own. So we give transformers a quantizer that only makes room for the
stored tensors (:class:`AwqLinear`); names, shards, ties and everything that is not quantized stay
its business. Which linears are quantized, the tensors say, not ``modules_to_not_convert``: that list
is missing from checkpoints whose vision tower is in floating point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.hf.tracing import base_model
from sparsevila_compile.kernels.awq_linear.layout import check_layout
from sparsevila_compile.kernels.w4a16_linear.packing import CODES_PER_WORD, GROUP_SIZES
from sparsevila_compile.ops import AWQ_LINEAR

PARTS = ("qweight", "qzeros", "scales")
METHOD = "sparsevila_awq"
"""The name under which transformers knows the quantizer below; checkpoints do not use it."""

_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


# ---------------------------------------------------------------------- what the configuration says


@dataclass(frozen=True)
class AwqFormat:
    """How a checkpoint's linears are quantized: 4 bits, "gemm" layout, with zero points.

    Attributes:
        group_size: input channels that share a scale and a zero point.
        skipped: ``modules_to_not_convert``.
    """

    group_size: int
    skipped: tuple[str, ...]


def awq_format(config: Any, where: str) -> AwqFormat | None:
    """How a configuration says that its checkpoint is quantized; None where it is not.

    Args:
        where: what error messages start with.

    Raises:
        UserError: it is quantized in another way than this package takes over.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    given = dict(found if isinstance(found, Mapping) else found.to_dict())

    def of(*keys: str, default: Any = None) -> Any:
        values = [given[k] for k in keys if given.get(k) is not None]
        return getattr(values[0], "value", values[0]) if values else default

    def refused(key: str, is_: Any, change: str) -> UserError:
        return UserError(f"{where}: quantization_config.{key} is {is_!r}; {change}")

    method = of("quant_method", default="bitsandbytes" if of("load_in_4bit") else None)
    whole = "or take the checkpoint that is not quantized"
    if method != "awq":
        raise refused(
            "quant_method", method, f"of quantized checkpoints only AWQ's are read; {whole}"
        )
    for key in ("version", "format", "checkpoint_format"):
        version = str(of(key, default="gemm")).lower()
        if version != "gemm":
            change = "only the layout 'gemm' is read; write it with version GEMM"
            raise refused(key, version, f"{change}, {whole}")
    if of("backend") == "llm-awq":
        raise refused("backend", "llm-awq", f"only the layout 'gemm' is read; {whole}")
    bits = of("bits", "w_bit", default=4)
    if bits != 4:
        raise refused("bits", bits, f"only 4 bits are read; {whole}")
    size = of("group_size", "q_group_size", default=128)
    if size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise refused("group_size", size, f"kernels take {sizes}; {whole}")
    if of("zero_point", default=True) is not True:
        change = "the layout 'gemm' has zero points; write it with zero_point true"
        raise refused("zero_point", of("zero_point"), f"{change}, {whole}")
    return AwqFormat(int(size), tuple(of("modules_to_not_convert", default=())))


# ---------------------------------------------------------------------- what the files hold


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, by its file's header."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[str]) -> list[Stored]:
    """Every tensor of safetensors files, without reading values.

    Raises:
        UserError: a file is missing or damaged.
    """
    import safetensors

    found = []
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as held:
                for name in held.keys():  # noqa: SIM118 (no mapping)
                    part = held.get_slice(name)
                    found.append(Stored(name, file, part.get_dtype(), tuple(part.get_shape())))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged: {error}") from error
    return found


def local_files(path: str) -> list[str]:
    """The safetensors files of a checkpoint directory that transformers would load; maybe none."""
    folder = Path(path)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [str(whole)]
    if not index.is_file():
        return []
    try:
        return sorted(
            {str(folder / f) for f in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: damaged: {error}; download it again") from error


# ---------------------------------------------------------------------- our linear


class AwqLinear(torch.nn.Module):
    """A linear in the layout of AWQ checkpoints, by the reference of its op.

    Args:
        qweight, qzeros, scales: see ``kernels/awq_linear/layout.py``.
        bias: ``[N]`` or None.
    """

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        group_size: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = qweight.shape[0], scales.shape[1]
        self.bits, self.group_size = 4, group_size
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", scales)
        if isinstance(bias, torch.nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer("bias", bias)

    @classmethod
    def empty(cls, linear: torch.nn.Linear, group_size: int, scales: torch.dtype) -> AwqLinear:
        """Room for a quantized linear in the place of one that is not; ``scales``: their dtype."""
        inputs, outputs = linear.in_features, linear.out_features
        groups, words = inputs // group_size, outputs // CODES_PER_WORD

        def room(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=linear.weight.device)

        return cls(
            room(inputs, words, torch.int32),
            room(groups, words, torch.int32),
            room(groups, outputs, scales),
            linear.bias,
            group_size,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.qweight, self.qzeros, self.scales)
        out: torch.Tensor = AWQ_LINEAR(x, *parts, self.bias, self.group_size)
        return out


def make_room(model: Any, form: AwqFormat, stored: list[Stored]) -> int:
    """Replace the linears that a checkpoint has quantized by empty :class:`AwqLinear`; their number.

    Args:
        stored: the checkpoint's tensors.

    Raises:
        UserError: a part is missing, belongs to no linear, or has another shape or dtype.
    """
    linears = _by_linear(model, stored)
    for path, parts in linears.items():
        some = next(iter(parts.values()))
        stem = some.name.rpartition(".")[0]
        if gone := [p for p in PARTS if p not in parts]:
            raise UserError(
                f"{some.file}: has {some.name}, but no {stem}.{gone[0]}; it is not whole"
            )
        linear = model.get_submodule(path)
        if linear.in_features % form.group_size or linear.out_features % CODES_PER_WORD:
            raise UserError(
                f"{some.file}: {stem} is {linear.out_features} x {linear.in_features}, which groups "
                f"of {form.group_size} and words of {CODES_PER_WORD} codes do not divide"
            )
        scales = _TYPES.get(parts["scales"].dtype, torch.int32)
        floats = scales if scales.is_floating_point else torch.float16
        room = AwqLinear.empty(linear, form.group_size, floats)
        for part, held in parts.items():
            wanted = getattr(room, part)
            if held.shape != tuple(wanted.shape) or _TYPES.get(held.dtype) != wanted.dtype:
                raise UserError(
                    f"{held.file}: {held.name} is {held.dtype} {list(held.shape)}, not "
                    f"{str(wanted.dtype).removeprefix('torch.')} {list(wanted.shape)} as AWQ's layout "
                    f"'gemm' and group_size {form.group_size} ask for"
                )
        model.set_submodule(path, room)
    return len(linears)


def _by_linear(model: Any, stored: list[Stored]) -> dict[str, dict[str, Stored]]:
    """The parts of quantized linears by the linear's path in the model, in the model's order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    paths = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    found: dict[str, dict[str, Stored]] = {path: {} for path in paths}
    names = {s.name for s in stored}
    for held in stored:
        stem, _, part = held.name.rpartition(".")
        if part not in PARTS:
            continue
        weight = f"{stem}.weight"
        # transformers' renames know the names of models that are not quantized.
        path = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)[0]
        path = (path if path in state else weight).removesuffix(".weight")
        if path not in found:
            raise UserError(
                f"{held.file}: {held.name} belongs to no linear of {type(model).__name__}"
            )
        if weight in names:
            raise UserError(
                f"{held.file}: has both {held.name} and {weight}; one of them is left over"
            )
        found[path][part] = held
    return {path: parts for path, parts in found.items() if parts}


def make_room_by_rule(model: Any, form: AwqFormat) -> int:
    """The same where no tensors are at hand: as AWQ tools choose, all linears of decoder layers.

    Scales are taken for float16, as AutoAWQ writes them.
    """
    layers = base_model(model).language_model.layers
    inside = {id(m) for m in layers.modules() if type(m) is torch.nn.Linear}
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in inside and not any(part in name for part in form.skipped)
    ]
    for name, linear in chosen:
        model.set_submodule(name, AwqLinear.empty(linear, form.group_size, torch.float16))
    return len(chosen)


def quantizer_config(form: AwqFormat) -> dict[str, Any]:
    """The ``quantization_config`` by which transformers takes our quantizer."""
    _register()
    return {"quant_method": METHOD, "group_size": form.group_size}


def _register() -> None:
    """Tell transformers of our quantizer, once a process."""
    from transformers.quantizers.auto import (
        AutoHfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if AutoHfQuantizer.supports_quant_method({"quant_method": METHOD}):
        return

    @register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, group_size: int, quant_method: Any = METHOD) -> None:
            self.quant_method, self.group_size = quant_method, group_size

    @register_quantizer(METHOD)
    class Quantizer(HfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
            given: Any = self.quantization_config
            files: list[str] = more["checkpoint_files"]
            if not make_room(model, AwqFormat(given.group_size, ()), read_headers(files)):
                raise UserError(
                    f"{files[0]}: holds no qweight, though config.json says that the checkpoint is "
                    "quantized; remove quantization_config from it if it is not"
                )

        def _process_model_after_weight_loading(self, model: Any, **more: Any) -> None:
            self.remove_quantization_config(model)  # what follows is ours, not transformers'

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False


# ---------------------------------------------------------------------- models in memory


def awq_linears(model: Any) -> dict[str, torch.nn.Module]:
    """The modules of a model that hold 4-bit codes in the layout of AWQ checkpoints, by path.

    Those of AutoAWQ and GPTQModel are told by their tensors, which other layouts do not fit.

    Raises:
        UserError: the model is quantized in another way, or its modules hold another layout.
    """
    form = awq_format(model.config, "the model")
    found = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
    if form is not None and not found:
        raise UserError(
            "the model: its quantization_config says AWQ, but no module of it holds a qweight"
        )
    for name, module in found.items():
        _check_module(name, module)
    return found


def _check_module(name: str, module: Any) -> None:
    kind = f"{name} ({type(module).__name__})"
    bits = getattr(module, "bits", getattr(module, "w_bit", None))
    qweight, qzeros, scales = tensors = [getattr(module, part, None) for part in PARTS]
    if bits != 4 or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise UserError(f"{kind}: is no linear in AWQ's 4 bits with {', '.join(PARTS)}")
    if getattr(module, "adapter", None) is not None:
        raise UserError(f"{kind}: has an adapter, which is not taken over; load the model without")
    try:
        check_layout(qweight, qzeros, scales, int(module.group_size))  # type: ignore[arg-type]
        held = (qweight.shape[0], scales.shape[1])  # type: ignore[union-attr]
        if held != (module.in_features, module.out_features):
            raise ValueError(f"it maps {module.in_features} to {module.out_features} features")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{kind}: {error}; kernels with a layout of their own cannot be taken over: load the "
            "model with quantization_config=AwqConfig(backend='torch_awq'), or by "
            "sparsevila_compile.dynamo.load_awq"
        ) from error


def adopt_awq(model: Any) -> dict[str, torch.nn.Module]:
    """Put our linears over the same tensors in the place of other packages'.

    Returns:
        What was replaced, by path.

    Raises:
        UserError: see :func:`awq_linears`; nothing is replaced then.
    """
    others = {n: m for n, m in awq_linears(model).items() if not isinstance(m, AwqLinear)}
    for name, module in others.items():
        old: Any = module
        bias = getattr(old, "bias", None)
        ours = AwqLinear(old.qweight, old.qzeros, old.scales, bias, int(old.group_size))
        model.set_submodule(name, ours.eval())
    return others


def check_adopted(model: Any) -> None:
    """Raise UserError where a model is quantized in a way that a trace could not see."""
    for name, module in awq_linears(model).items():
        if not isinstance(module, AwqLinear):
            raise UserError(f"{name}: is a {type(module).__name__}, which cannot be traced")


def parameter_count(model: Any) -> int:
    """Weights of a model, packed ones by what they stand for."""
    packed = [m for m in model.modules() if isinstance(m, AwqLinear)]
    whole: int = sum(p.numel() for p in model.parameters())
    return whole + sum(m.in_features * m.out_features for m in packed)
