"""One model behind the backend: its compiled program, and the stand-ins that its loop gets.

The first forward traces the model and runs the recipe's passes; then the model is settled: weights
that the program does not use are let go, encoders are put off to the engine, and the stock forward
refuses to run outside of the backend, where it would compute with what is no longer there.
"""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.compiler import DTYPES
from sparsevila_compile.dynamo.adapter import generate_arguments, may_vary
from sparsevila_compile.dynamo.backend_report import BackendReport
from sparsevila_compile.dynamo.capture import Forward
from sparsevila_compile.dynamo.inner import make_runner
from sparsevila_compile.dynamo.settings import Settings
from sparsevila_compile.dynamo.standins import emptied, record_of, stand_in
from sparsevila_compile.dynamo.turns import Place, StepConversation
from sparsevila_compile.engine import Engine
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Modality, family_of
from sparsevila_compile.manager import run_passes
from sparsevila_compile.pass_base import Context, Pass, PassError
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import PromptReader
from sparsevila_compile.trace import trace

_MODEL = "sparsevila_served"


def served_of(module: torch.nn.Module) -> Served | None:
    """What serves a model or its base model, or None."""
    found: Served | None = module.__dict__.get(_MODEL)
    return found


class Served:
    """A model that the backend serves.

    Attributes:
        dense: the stock forward is run as it is: the recipe cannot be applied (the report says why).
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.family = family_of(model.config.to_dict())
        self.report = BackendReport(
            recipe=settings.recipe.file, inner=settings.inner, unused=settings.unused
        )
        self.dense = False
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._reader: PromptReader | None = None
        self._others: dict[str, torch.nn.Module] | None = None
        for owner in (model, hf.base_model(model)):
            owner.__dict__[_MODEL] = self

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError("a compiled model cannot be copied; copy it before it is compiled")

    @property
    def settled(self) -> bool:
        """Whether the model is compiled."""
        return self._engine is not None

    def every_pass(self, why: str, change: str) -> None:
        """Note that none of the recipe's passes is applied."""
        for item in self.settings.recipe.passes:
            self.report.missed(item.name, why, change, self.settings.strict)

    # ------------------------------------------------------------------ other packages' linears

    def adopt(self) -> bool:
        """Take over AWQ linears of another package, once; whether there are any.

        Their own forward may break the graph, or pack its tensors anew at the first call.
        """
        if self._others is not None or self.dense:
            return False
        try:
            self._others = hf.adopt_awq(self.model)
        except UserError as error:
            self.every_pass(str(error), "then compile it")
            self.dense = True
            return False
        return self.adopted

    @property
    def adopted(self) -> bool:
        """Whether linears of another package have been taken over."""
        return bool(self._others)

    def give_back(self) -> bool:
        """Put those linears back, where the model stays as it was; whether there were any."""
        others, self._others = self._others or {}, {}
        for name, module in others.items():
            self.model.set_submodule(name, module)
        return bool(others)

    # ------------------------------------------------------------------ compile

    def settle(self) -> None:
        """Compile the model and let go of what is not used any more; once.

        Raises:
            UserError: the model or the recipe is at fault.
        """
        with self._lock:
            if self.settled:
                return
            program = self._compile()
            reader = PromptReader(program, self.family)
            self._engine = Engine(program, self.family, make_runner(self.settings.inner, program))
            self._reader = reader
            self._let_go(program)
            base = hf.base_model(self.model)
            for modality in self.family.modalities:
                name = f"get_{modality.name}_features"
                setattr(base, name, self._intake(modality, getattr(base, name)))
            base.register_forward_pre_hook(_refuse_stock_forward)
            if self.report.freed_bytes:
                self.model.register_state_dict_pre_hook(_refuse_state_dict)

    def _compile(self) -> Program:
        recipe = self.settings.recipe
        wanted = DTYPES[recipe.model.dtype] if self.settings.named else None
        have = next(self.model.parameters()).dtype
        if wanted is not None and wanted != have:
            raise recipe.error(
                ("model", "dtype"),
                f"the model was loaded in {have}; load it with dtype={wanted}, or set dtype: auto",
            )
        passes = recipe.build()
        while True:
            program = trace(self.model)
            context = Context(processor=self._processor(passes), base=str(recipe.directory))
            try:
                self.report.passes = run_passes(program, passes, context)
            except PassError as error:
                if error.index is None or self.settings.strict:
                    raise
                failed = passes.pop(error.index)
                if failed.name == "insert_kv_cache":
                    raise
                why = str(error).removeprefix(failed.name).lstrip(": ")
                change = "remove it from the recipe, or change its options"
                self.report.missed(failed.name, why, change, strict=False)
                continue
            if not program.caches:
                raise UserError(
                    f"{recipe.file}: lists no insert_kv_cache; generate cannot run without a cache, add it"
                )
            return program

    def _processor(self, passes: list[Pass[Any]]) -> Any:
        """The checkpoint's processor, where a pass reads calibration data."""
        if not any(getattr(p.config, "calibration", None) for p in passes):
            return None
        recipe = self.settings.recipe
        where = recipe.checkpoint() if self.settings.named else self.model.config._name_or_path
        if not self.settings.named and not Path(where).is_dir():
            raise UserError(
                "calibration needs the checkpoint's processor; say where it is: recipe={'model': {'path': …}, …}"
            )
        with recipe.blame("model", "path"):
            return hf.load_processor(where)

    def _let_go(self, program: Program) -> None:
        """Empty every parameter whose values the program does not use, and codes that it repacked."""
        used = {w.untyped_storage().data_ptr() for w in program.weights.values()}
        gone: set[int] = set()
        packed = [m for linear in hf.awq_linears(self.model).values() for m in linear.buffers()]
        for tensor in (*self.model.parameters(), *packed):
            at = tensor.untyped_storage().data_ptr()
            if at in used:
                continue
            size = emptied(tensor)
            self.report.freed_bytes += 0 if at in gone else size
            gone.add(at)
        self._others = {}
        if gone:
            gc.collect()  # graph modules are reference cycles that hold replaced weights

    # ----------------------------------------------------------------- pictures

    def _intake(self, modality: Modality, stock: Callable[..., Any]) -> Callable[..., Any]:
        """What takes an encoder's place: it keeps the pictures for the forward that follows."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        names = _inputs_of(modality)
        signature = inspect.signature(stock)
        parameters = list(signature.parameters.values())
        extra = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
            for n in names
            if n not in signature.parameters
        ]
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        signature = signature.replace(
            parameters=[*(p for p in parameters if p not in rest), *extra, *rest]
        )

        def intake(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return stock(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            given.pop("return_dict", None)
            pictures = {n: given.pop(n) for n in names if given.get(n) is not None}
            changed = [n for n, v in given.items() if v is not None]
            if changed:
                raise UserError(f"{changed[0]} cannot be changed once a model is compiled")
            kept: Any = [self._keep(modality, pictures)]  # a list, as the stock encoders return
            return BaseModelOutputWithPooling(pooler_output=kept)

        intake.__signature__ = signature  # type: ignore[attr-defined]
        return intake

    def _keep(self, modality: Modality, pictures: dict[str, Any]) -> torch.Tensor:
        assert self._engine is not None
        program = self._engine.program
        count = self._count(modality, pictures)
        width = int(program.config["text_config"]["hidden_size"])
        kept = stand_in(pictures, [(count, width)], program.dtype, program.device)[0]
        return may_vary(kept, 0)

    def _count(self, modality: Modality, pictures: dict[str, Any]) -> int:
        """Visual tokens of pictures before pruning."""
        assert self._engine is not None
        layout = self._engine.program.layout
        if modality.grid is None:
            return len(pictures[modality.pixels]) * (layout.tokens_per_picture or 0)
        grid = pictures.get(modality.grid)
        if not isinstance(grid, torch.Tensor):
            raise UserError(f"{modality.pixels} came without {modality.grid}")
        return int(grid.prod(-1).sum()) // layout.merge_unit

    def _pictures(self, forward: Forward, args: tuple[Any, ...]) -> dict[str, Any]:
        """Processor outputs for the pictures of a prompt."""
        names = {n for modality in self.family.modalities for n in _inputs_of(modality)}
        found: dict[str, Any] = {n: args[i] for n, i in forward.arguments.items() if n in names}
        ids = args[forward.arguments["input_ids"]]
        for modality in self.family.modalities:
            features = [args[i] for i in forward.features.get(modality.name, ())]
            if not features:
                continue
            pictures = record_of(features[0])
            if not isinstance(pictures, dict):
                given = generate_arguments(self.model) or {}
                pictures = {n: given[n] for n in _inputs_of(modality) if given.get(n) is not None}
            found |= self._repeated(modality, pictures, features, ids)
        return found

    def _repeated(
        self,
        modality: Modality,
        pictures: dict[str, Any],
        features: list[torch.Tensor],
        ids: torch.Tensor,
    ) -> dict[str, Any]:
        """Pictures as often as several sequences a prompt ask for them."""
        count = self._count(modality, pictures) if modality.pixels in pictures else 0
        if count == 0 or sum(map(len, features)) % count:
            raise UserError(
                f"the visual tokens of this forward are not those of {modality.pixels} (were they given as mm_encoder_outputs, or split by prefill_chunk_size?); pass {modality.pixels} to generate, which the compiled model encodes and prefills in chunks itself"
            )
        assert self._reader is not None
        tokens = [t for t, m in self._reader.tokens.items() if m is modality]
        copies = int((ids == tokens[0]).sum()) // count if len(ids) > 1 else 1
        if copies < 2:
            return pictures
        if copies != len(ids):
            raise UserError(
                "several sequences a prompt (num_return_sequences, num_beams) and several prompts with pictures: ask one prompt at a time"
            )
        return {n: torch.cat([torch.as_tensor(v)] * copies) for n, v in pictures.items()}

    # ------------------------------------------------------------------ forward

    def run(self, forward: Forward, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The logits and cache stand-ins of one forward, in the order of its outputs.

        Raises:
            UserError: the prompt, its pictures and its cache do not fit together.
        """
        assert self._engine is not None
        assert self._reader is not None
        places = forward.arguments
        ids, mask, positions = (
            args[places[name]] if name in places else None
            for name in ("input_ids", "attention_mask", "position_ids")
        )
        assert ids is not None
        pictures = self._pictures(forward, args)
        past = [args[i] for i in forward.past]
        conversation, columns = self._place(past, len(ids))
        logits = conversation.forward(ids, mask, positions, pictures, columns)
        self.report.usage = conversation.usage
        shapes = [tuple(size(args) for size in sizes) for sizes in forward.caches]
        shown = max(shape[2] for shape in shapes)
        place = Place(conversation, conversation.columns, len(conversation.cuts), shown)
        caches = iter(stand_in(place, shapes, logits.dtype, logits.device))
        return [
            logits if role == "logits" else may_vary(next(caches), 2)
            for role in forward.outputs
            if role != "rest"
        ]

    def _place(self, past: list[torch.Tensor], rows: int) -> tuple[StepConversation, int]:
        """The conversation that a cache stands for, and how many columns of it are used."""
        assert self._engine is not None
        assert self._reader is not None
        if not past:
            limit = self._engine.program.max_length
            return StepConversation(self._engine, self._reader, rows, limit), 0
        place = record_of(past[0])
        if not isinstance(place, Place) or any(record_of(t) is not place for t in past):
            raise UserError(
                "past_key_values holds no cache of this compiled model: caches cannot be copied, reordered (beam search) or taken from another model; ask without past_key_values"
            )
        if place.conversation.engine is not self._engine:
            raise UserError("past_key_values belongs to another compiled model; ask without it")
        return place.conversation, place.used(max(int(t.shape[2]) for t in past))


def _inputs_of(modality: Modality) -> list[str]:
    """Processor outputs that describe pictures of this kind."""
    names = [modality.pixels, *([modality.grid] if modality.grid else [])]
    return [*names, "second_per_grid_ts"] if modality.name == "video" else names


def _refuse_stock_forward(module: Any, args: Any) -> None:
    if not torch.compiler.is_compiling():
        raise UserError(
            "this model's stock forward was called outside of backend sparsevila, which holds its weights and caches; call it as it was compiled, or load it anew"
        )


def _refuse_state_dict(module: Any, prefix: Any, keep_vars: Any) -> None:
    raise UserError(
        "this model's weights were replaced by the compiled ones, so they cannot be saved from here; save the checkpoint that it was loaded from, or compile an artifact with sparsevila-compile"
    )
