"""What the headline benchmark runs on and what it reports, shared by every side of it.

A :class:`ModelShape` names the sizes of a vision-language model, a :class:`Setting` one request to
it, and :class:`Measured` what one side took for it. No side's code is imported here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a Llama/Qwen2 decoder: RMSNorm, GQA with RoPE, SwiGLU."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qkv_bias: bool
    rope_theta: float
    mrope_section: tuple[int, int, int] | None = None  # None: 1-D RoPE
    norm_eps: float = 1e-6

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(K, N)`` of a layer's four linears, q/k/v and gate/up merged."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (self.hidden, qkv),
            "o": (self.heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.inter),
            "down": (self.inter, self.hidden),
        }

    def cache_bytes(self, tokens: int) -> int:
        """bf16 keys and values of ``tokens`` positions in every layer."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * tokens


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower and its projector.

    ``qwen2_5_vl``: RMSNorm, SwiGLU, 2-D RoPE, attention within windows of ``window`` x ``window``
    patches except in the layers of ``full_attention``, and a merger of ``merge`` x ``merge``
    patches into one visual token. ``clip``: LayerNorm, quick GELU, learned positions, a class
    token that is dropped, features of the last layer but one, and a two-layer projector.
    """

    kind: Literal["qwen2_5_vl", "clip"]
    hidden: int
    inter: int
    layers: int
    heads: int
    head_dim: int
    patch_dim: int  # numbers in one patch: channels x frames x side x side
    out: int
    merge: int = 1
    full_attention: tuple[int, ...] = ()
    window: int = 0
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model by its sizes."""

    name: str
    language: LanguageShape
    vision: VisionShape


@dataclass(frozen=True)
class Setting:
    """One request: every row of the batch holds the same pictures' sizes and a text prompt.

    ``pictures`` holds one row's grids in patches, height and width; each gives
    ``height * width / merge**2`` visual tokens.
    """

    name: str
    pictures: tuple[tuple[int, int], ...]
    batch: int = 1
    text_tokens: int = 48
    new_tokens: int = 128
    merge: int = 2

    @property
    def patches(self) -> int:
        """Patches of one row."""
        return sum(height * width for height, width in self.pictures)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one row."""
        return self.patches // self.merge**2

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of one row: visual and text."""
        return self.visual_tokens + self.text_tokens


@dataclass
class Measured:
    """What one side took for one setting. Seconds, milliseconds and bytes as named.

    Times are medians over repeats, of the synchronised host clock where the name says nothing
    else. ``None`` where a side has no such part; ``notes`` says why and names every shortcut.
    """

    side: str
    shape: str
    setting: str
    batch: int
    visual_tokens: int
    new_tokens: int
    vision_s: float | None
    llm_prefill_s: float | None  # from visual tokens to the first token's logits, all rows
    ttft_s: float  # from pixels and ids on the device to the first token known to the host
    decode_ms: float  # a step (one token of every row): median
    decode_ms_p20: float
    decode_ms_p80: float
    tokens_per_s: float  # decode, all rows together
    end_to_end_s: float  # ttft and new_tokens - 1 steps
    peak_memory_bytes: int
    idle_host_ms: float | None  # a token's wall time less the device's busy time
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    repeats: int = 1
    shares: dict[str, float] = field(default_factory=dict)  # of end to end, by part
    chosen: dict[str, str] = field(default_factory=dict)  # kernels, by what they do
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self)


def _qwen(
    name: str,
    hidden: int,
    inter: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    vision_inter: int,
) -> ModelShape:
    return ModelShape(
        name,
        LanguageShape(
            hidden=hidden,
            inter=inter,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=128,
            vocab=vocab,
            qkv_bias=True,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
        ),
        VisionShape(
            kind="qwen2_5_vl",
            hidden=1280,
            inter=vision_inter,
            layers=32,
            heads=16,
            head_dim=80,
            patch_dim=3 * 2 * 14 * 14,
            out=hidden,
            merge=2,
            full_attention=(7, 15, 23, 31),
            window=8,
        ),
    )


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _qwen("qwen2.5-vl-3b", 2048, 11008, 36, 16, 2, 151936, 3420),
        _qwen("qwen2.5-vl-7b", 3584, 18944, 28, 28, 4, 152064, 3420),
        _qwen("qwen2.5-vl-32b", 5120, 27648, 64, 40, 8, 152064, 3456),
        ModelShape(
            "llava-1.5-7b",
            LanguageShape(
                hidden=4096,
                inter=11008,
                layers=32,
                heads=32,
                kv_heads=32,
                head_dim=128,
                vocab=32064,
                qkv_bias=False,
                rope_theta=1e4,
                norm_eps=1e-5,
            ),
            VisionShape(
                kind="clip",
                hidden=1024,
                inter=4096,
                layers=24,
                heads=16,
                head_dim=64,
                patch_dim=3 * 14 * 14,
                out=4096,
                norm_eps=1e-5,
            ),
        ),
    )
}


def qwen_setting(pictures: int, batch: int = 1, side: int = 64, **more: int) -> Setting:
    """``pictures`` square pictures of ``side`` x ``side`` patches (64: 896 pixels, 1,024 tokens)."""
    tokens = pictures * side * side // 4
    return Setting(f"{tokens} visual, batch {batch}", ((side, side),) * pictures, batch, **more)


def llava_setting(pictures: int = 16, batch: int = 1, **more: int) -> Setting:
    """``pictures`` pictures of 24 x 24 patches (336 pixels, 576 tokens)."""
    tokens = pictures * 576
    return Setting(
        f"{tokens} visual, batch {batch}", ((24, 24),) * pictures, batch, merge=1, **more
    )


SETTINGS: dict[str, Setting] = {
    "8k": qwen_setting(8),
    "49k": qwen_setting(48),
    "98k": qwen_setting(96),
    "8k-b8": qwen_setting(8, 8),
    "49k-b8": qwen_setting(48, 8),
    "98k-b8": qwen_setting(96, 8),
    "8k-b32": qwen_setting(8, 32),
    "49k-b32": qwen_setting(48, 32),
    "llava": llava_setting(16),
    "llava-b8": llava_setting(16, 8),
}
