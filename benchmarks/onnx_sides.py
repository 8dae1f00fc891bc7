"""What ``benchmarks.onnx`` compares: bundles of this package and transformers' own ONNX export.

Every side decodes one token over the same cached keys and values, and feeds a prompt of the same
embeddings, on ONNX Runtime with inputs and outputs bound on the device.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import AutoProcessor, DynamicCache, GenerationConfig

from benchmarks.onnx_agreement import CARDS, FUSING
from sparsevila_compile.budget import keep_count
from sparsevila_compile.manager import run_passes
from sparsevila_compile.onnx import bundle
from sparsevila_compile.onnx.lowering import LowerToOnnx
from sparsevila_compile.onnx.runner import PROVIDERS, OnnxRunner
from sparsevila_compile.pass_base import PASSES, Context
from sparsevila_compile.trace import trace


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        visual, text: tokens in the cache; half of the text stands before the visual tokens.
        prompt: tokens of a new prompt, as many of them visual as in the cache, in proportion.
        prune, retrieve: shares that the sparse side keeps.
    """

    visual: int
    text: int
    prompt: int
    prune: float
    retrieve: float

    def kept(self) -> int:
        return keep_count(self.prune, self.visual)

    def attended(self) -> int:
        return keep_count(self.retrieve, self.kept())

    def pruned_prompt(self) -> tuple[int, int]:
        """Text and visual tokens of the prompt after pruning."""
        visual = round(self.prompt * self.visual / (self.visual + self.text))
        return self.prompt - visual, keep_count(self.prune, visual)


def passes(sparse: Load | None) -> list[Any]:
    """The dense recipe's passes, or the sparse one's."""
    listed: list[tuple[str, dict[str, Any]]] = [("insert_kv_cache", {"max_length": 65536})]
    if sparse is not None:
        listed.insert(0, ("prune_visual_tokens", {"keep_ratio": sparse.prune}))
        options = {"keep_ratio": sparse.retrieve, "when": "always"}  # this is what is measured
        listed.append(("sparsify_decode_attention", options))
    listed += [(name, {}) for name in FUSING]
    return [PASSES[n](PASSES[n].config_type(**options)) for n, options in listed]


def write_bundle(model: Any, sparse: Load | None, folder: Path) -> Path:
    """Compile a model to a bundle."""
    program = trace(model)
    lowering = LowerToOnnx.of("auto", pure=False)
    reports = run_passes(program, passes(sparse), Context(), lowering=lowering)
    processor = AutoProcessor.from_pretrained(CARDS / "checkpoint")
    return bundle.save(
        program, processor, reports, {}, folder, overwrite=True, options=lowering.options
    )


def open_bundle(
    folder: Path, device: torch.device, graphs: tuple[str, ...], profile: Path | None = None
) -> OnnxRunner:
    """A bundle's runner with these graphs alone: the others' sessions would take memory."""
    _, manifest = bundle.load_bundle(folder)
    wanted = {name: manifest["graphs"][name] for name in ("embed", *graphs)}
    return OnnxRunner(folder, {**manifest, "graphs": wanted}, device, profile)


class Bundle:
    """A bundle of this package over some cached tokens.

    Args:
        index: positions that a sparse decode step reads below ``tail``; None decodes densely.
    """

    def __init__(
        self,
        runner: OnnxRunner,
        caches: dict[str, torch.Tensor],
        index: torch.Tensor | None = None,
        tail: int = 0,
    ) -> None:
        self.runner = runner
        self.device = device = runner.device
        self.held = next(iter(caches.values())).shape[2]
        room = 64
        self.caches = {
            name: torch.cat([c, c.new_zeros((*c.shape[:2], room, c.shape[3]))], 2)
            for name, c in caches.items()
        }
        self._places: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        self.sparse: dict[str, torch.Tensor] = {}
        if index is not None:
            names = [n.replace("k_cache", "index") for n in caches if n.startswith("k_cache")]
            self.sparse = dict.fromkeys(names, index.to(device, torch.int32)[None, None])
            self.sparse["tail_start"] = self._int32(tail)

    def _int32(self, value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32, device=self.device)

    def _inputs(self, embeds: torch.Tensor, held: int, position: int) -> dict[str, Any]:
        key = (embeds.shape[1], held, position)
        if key not in self._places:  # an engine keeps these on its device from step to step
            self._places[key] = self._placed(*key)
        return {"inputs_embeds": embeds, **self._places[key]}

    def _placed(self, count: int, held: int, position: int) -> dict[str, torch.Tensor]:
        places = torch.arange(position, position + count, device=self.device)
        return {
            "position_ids": places[None],
            "logit_rows": torch.tensor([[count - 1]], device=self.device),
            "cache_lens": self._int32(held),
            "new_lens": self._int32(count),
        }

    def decode(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Logits ``[vocabulary]`` of one token behind the cache; the cache's length stays."""
        embeds = self.runner.run("embed", {"input_ids": token})["inputs_embeds"]
        inputs = {**self._inputs(embeds, self.held, position), **self.caches, **self.sparse}
        graph = "decode" if self.sparse else "language"
        return self.runner.run(graph, inputs)["logits"][0, 0]

    def prefill(self, embeds: torch.Tensor, visual: int) -> torch.Tensor:
        """Logits of the last of some embeddings ``[1, n, width]``, cached from position 0 on.

        ``visual`` of them, from the second on, are visual tokens, which a sparse one scores.
        """
        if not self.sparse and visual:
            raise ValueError("a dense bundle scores nothing")
        columns = torch.arange(1, 1 + visual, dtype=torch.int32, device=self.device)[None]
        caches = {n: c[:, :, : embeds.shape[1] + 8].contiguous() for n, c in self.caches.items()}
        out = {}
        for start in range(0, embeds.shape[1], self.runner.prefill_chunk):
            piece = embeds[:, start : start + self.runner.prefill_chunk].contiguous()
            inputs = {**self._inputs(piece, start, start), **caches, "score_columns": columns}
            count = piece.shape[1]
            inputs["score_weights"] = torch.full((1, count), 1 / count, device=self.device)
            out = self.runner.run("turn" if self.sparse else "language", inputs)
        return out["logits"][0, 0]


class Stock:
    """transformers' ``OnnxExporter`` output, its sessions bound as well as they can be.

    Its caches are inputs and outputs of different lengths, so a step writes them anew.
    """

    def __init__(
        self, sessions: dict[str, Any], device: torch.device, caches: dict[str, torch.Tensor]
    ) -> None:
        self.sessions, self.device = sessions, device
        self._places: dict[int, torch.Tensor] = {}
        self.past = {
            f"input.past_key_values.layers.{name.rpartition('_')[2]}."
            + ("keys" if name[0] == "k" else "values"): c
            for name, c in caches.items()
        }

    def _run(self, component: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        session = self.sessions[component]
        binding = session.io_binding()
        kept = []
        for value in session.get_inputs():
            tensor = inputs[value.name].contiguous()
            kept.append(tensor)
            given = onnxruntime.OrtValue.from_dlpack(tensor)
            binding.bind_ortvalue_input(value.name, given)
        for value in session.get_outputs():
            binding.bind_output(value.name, self.device.type, 0)
        session.run_with_iobinding(binding)
        return torch.utils.dlpack.from_dlpack(binding._iobinding.get_outputs()[0])

    def decode(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Logits ``[vocabulary]`` of one token behind the cache."""
        if position not in self._places:
            self._places[position] = torch.tensor([[position]], device=self.device)
        place = self._places[position]
        inputs = {"input_ids": token, "position_ids": place, **self.past}
        return self._run("decode", inputs)[0, -1]

    def prefill(self, embeds: torch.Tensor, visual: int) -> torch.Tensor:
        """Logits of the last of some embeddings ``[1, n, width]``, none of them cached before."""
        places = torch.arange(embeds.shape[1], device=self.device)[None]
        hidden = self._run("language_model", {"inputs_embeds": embeds, "position_ids": places})
        [name] = [v.name for v in self.sessions["lm_head"].get_inputs()]
        return self._run("lm_head", {name: hidden[:, -1:]})[0, -1]


class TorchModel:
    """transformers' own model in torch, which all sides are compared with."""

    def __init__(self, model: Any, device: torch.device) -> None:
        # Exports trace the model where it is, so a device gets a copy.
        self.model = model if device.type == "cpu" else copy.deepcopy(model).to(device)
        self.device = device

    def _logits(self, embeds: torch.Tensor, caches: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the last embedding ``[1, n, width]`` behind cached tokens, ``[vocabulary]``."""
        model, held = self.model, 0
        past = DynamicCache()
        for name, keys in caches.items():
            if name[0] == "k":
                layer = int(name.rpartition("_")[2])
                past.update(keys.clone(), caches["v" + name[1:]].clone(), layer)
                held = keys.shape[2]
        places = torch.arange(held, held + embeds.shape[1], device=self.device)[None]
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=places, past_key_values=past, use_cache=True
        )
        logits: torch.Tensor = model.lm_head(out.last_hidden_state[:, -1])[0]
        return logits

    def decode(self, token: torch.Tensor, caches: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits ``[vocabulary]`` of one token behind the caches."""
        return self._logits(self.model.get_input_embeddings()(token), caches)

    def prefill(self, embeds: torch.Tensor) -> torch.Tensor:
        """Logits of the last of some embeddings ``[1, n, width]``."""
        return self._logits(embeds, {})


def open_stock(folder: Path, device: torch.device, graphs: tuple[str, ...]) -> dict[str, Any]:
    """Sessions of an export of transformers' own."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    kind = PROVIDERS[device.type]
    opened = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=[kind])
        for name in graphs
    }
    for name, session in opened.items():
        if kind not in session.get_providers():
            raise RuntimeError(f"{kind} does not start for {name}.onnx")
    return opened


def write_stock(model: Any, sample: dict[str, Any], folder: Path, fusions: str | None) -> Path:
    """Export a model with transformers' own exporter, for any length.

    Args:
        fusions: the provider whose fused ops it may use, or None for its plain graph.

    Raises:
        ImportError: ``onnxscript`` is not installed.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    generation = GenerationConfig(max_new_tokens=3, do_sample=False)
    exported = OnnxExporter().export_for_generation(
        model,
        copy.copy(sample),
        OnnxConfig(dynamic=True, ort_fusions=fusions),  # type: ignore[arg-type]
        generation_config=generation,
        multi_token_decode=True,
    )
    exported.save_pretrained(folder)
    return folder


def decode_bytes(model: Any, tokens: int) -> int:
    """Bytes that a decode step must read: the decoder's and head's weights, and cached tokens."""
    text = model.config.text_config
    decoder = model.model.language_model.layers
    weights = [*decoder.parameters(), *model.lm_head.parameters()]
    size = weights[0].element_size()
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens
    return sum(w.numel() for w in weights) * size + kv * size


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
