"""What a request must look like before anything is done with it; every refusal is one line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Modality, patch_values


def _tensor(name: str, value: Any, fetch: bool = True) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{name} must be a torch tensor, not a {type(value).__name__}")
    return value.detach().cpu() if fetch else value.detach()


def _integers(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"{name} must be a tensor of integers, not of {value.dtype}")
    return value


def check_ids(
    inputs: dict[str, Any], vocabulary: int, placeholders: Collection[int]
) -> list[torch.Tensor]:
    """The ids of every row without padding, on the CPU.

    Args:
        inputs: processor outputs.
        vocabulary: rows of the embedding table.
        placeholders: ids that may lie outside of it.

    Raises:
        UserError: no ids, or ids that this model does not have.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise UserError("input_ids must be a tensor [batch, length] with at least one token")
    ids = _integers("input_ids", ids.cpu())
    keep = torch.ones_like(ids, dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        keep = _tensor("attention_mask", inputs["attention_mask"]).bool()
    if keep.shape != ids.shape:
        raise UserError(
            f"attention_mask has the shape {tuple(keep.shape)}, input_ids {tuple(ids.shape)}"
        )
    whole = bool(keep.all())
    rows = [row if whole else row[mask] for row, mask in zip(ids, keep, strict=True)]
    for b, row in enumerate(rows):
        if not len(row):
            raise UserError(f"row {b} of the batch has no tokens")
        outside = row[(row < 0) | (row >= vocabulary)]
        wrong = outside[~torch.isin(outside, torch.tensor(sorted(placeholders)))]
        if len(wrong):
            raise UserError(
                f"input_ids holds {int(wrong[0])}, but the vocabulary has {vocabulary} tokens; is this another model's processor?"
            )
    return rows


def check_pixels(modality: Modality, pixels: Any, vision: dict[str, Any]) -> torch.Tensor:
    """Pixels of one kind of picture, where they lie: ``[pictures, channels, H, W]`` or ``[patches,
    values]``.

    Args:
        pixels: the processor's.
        vision: the encoder's configuration.

    Raises:
        UserError: not what the encoder takes.
    """
    name = modality.pixels
    checked = _tensor(name, pixels, fetch=False)
    if not checked.is_floating_point():
        raise UserError(
            f"{name} must be a floating tensor, not of {checked.dtype}; let the processor rescale and normalise"
        )
    if modality.grid is not None:
        values = patch_values(vision)
        if checked.ndim != 2 or checked.shape[1] != values:
            raise UserError(
                f"{name} must be [patches, values], {values} values a patch, not {tuple(checked.shape)}"
            )
        return checked
    if checked.ndim != 4:
        raise UserError(
            f"{name} must be [pictures, channels, height, width], not {tuple(checked.shape)}"
        )
    channels, side = int(vision.get("num_channels", 3)), int(vision["image_size"])
    if checked.shape[1] != channels:
        raise UserError(
            f"{name} have {checked.shape[1]} channel(s) a picture; the encoder takes {channels}"
        )
    if tuple(checked.shape[2:]) != (side, side):
        raise UserError(
            f"{name} are {tuple(checked.shape[2:])} pixels; the encoder takes {side} × {side}"
        )
    return checked


def check_grid(
    modality: Modality, grid: Any, patches: int, merge: int
) -> list[tuple[int, int, int]]:
    """(time, height, width) in patches of every picture.

    Args:
        grid: the processor's ``[pictures, 3]``.
        patches: how many there are in all.
        merge: patches a side that become one visual token.

    Raises:
        UserError: there is none, or it does not describe these patches.
    """
    if grid is None:
        raise UserError(f"{modality.pixels} came without {modality.grid}")
    grid = _integers(str(modality.grid), _tensor(str(modality.grid), grid))
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise UserError(f"{modality.grid} must be [pictures, 3], not {tuple(grid.shape)}")
    sizes = [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
    for size in sizes:
        if min(size) < 1 or size[1] % merge or size[2] % merge:
            raise UserError(
                f"{modality.grid} holds {size}: time, height and width must be positive, height and width a multiple of {merge}"
            )
    total = sum(t * h * w for t, h, w in sizes)
    if total != patches:
        raise UserError(
            f"{modality.grid} describes {total} patches, {modality.pixels} holds {patches}"
        )
    return sizes


def check_seconds(seconds: Any, videos: int) -> list[float] | None:
    """Seconds a temporal step of every video, where the request has them.

    Raises:
        UserError: not one number a video.
    """
    if seconds is None:
        return None
    listed = seconds.tolist() if isinstance(seconds, torch.Tensor) else list(seconds)
    if len(listed) != videos or not all(isinstance(s, (int, float)) for s in listed):
        raise UserError(
            f"second_per_grid_ts has {len(listed)} entries for {videos} videos; it holds one number a video"
        )
    return [float(s) for s in listed]
