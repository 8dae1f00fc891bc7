"""Selection of tokens against ``torch.topk`` and a sort of what it finds, all in one run.

    python -m benchmarks.kernels.select_tokens --out select_tokens.json [--limit SECONDS]

A result that differs from the reference's by one index is not timed. The rival takes segments of
one length as rows, leaves ties open and does not turn rows into indices of the flat scores. The
floor is the time to read the scores and write the indices once at 4 TB/s, and one launch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import save, time_graph, within
from sparsevila_compile.ops import SELECT_TOKENS

DEVICE = torch.device("cuda")
LAUNCH_US, BYTES_PER_US = 0.9, 4e6


@dataclass(frozen=True)
class Setting:
    name: str
    segments: int
    length: int
    keep: int


SETTINGS = [
    Setting("retrieval, one layer", 1, 100_000, 10_000),
    Setting("retrieval, one layer", 1, 45_000, 4500),
    Setting("retrieval, one layer", 1, 12_288, 1229),
    Setting("retrieval, 28 layers", 28, 45_000, 4500),
    Setting("retrieval, 28 layers", 28, 12_288, 1229),
    Setting("retrieval, 28 layers of 8 prompts", 224, 12_288, 1229),
    Setting("pictures", 64, 256, 64),
    Setting("frames", 256, 196, 49),
    Setting("pictures, odd", 97, 729, 183),
    Setting("retrieval, 36 layers", 36, 12_345, 1235),
    Setting("retrieval, 64 layers", 64, 49_173, 4917),
    Setting("one long video", 1, 196_608, 49_152),
]


def measure(s: Setting) -> dict[str, Any]:
    g = torch.Generator(device=DEVICE).manual_seed(0)
    # Alike in their upper bits, as column sums are.
    scores = torch.randn(s.segments * s.length, device=DEVICE, generator=g).mul_(0.3).exp_()
    scores /= s.length
    row = torch.arange(s.segments, device=DEVICE)
    lengths, keep = torch.full_like(row, s.length), torch.full_like(row, s.keep)
    arguments = (scores, row * s.length, lengths, keep, row * s.keep, s.segments * s.keep)
    result: dict[str, Any] = asdict(s) | {
        "floor_us": LAUNCH_US + (4 * scores.numel() + 8 * s.segments * s.keep) / BYTES_PER_US
    }
    if not torch.equal(SELECT_TOKENS(*arguments, impl="triton"), SELECT_TOKENS(*arguments)):
        return result | {"failed": "not the reference's indices"}
    rows = scores.view(s.segments, s.length)
    result["ours_us"] = time_graph([lambda: SELECT_TOKENS(*arguments, impl="triton")] * 4).median
    result["topk_sort_us"] = time_graph(
        [lambda: rows.topk(s.keep, sorted=False).indices.sort().values] * 4
    ).median
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=0, help="begin no setting after SECONDS")
    arguments = parser.parse_args()
    print(f"{'setting':52} {'ours':>8} {'topk':>8} {'floor':>6}  us")
    results: list[dict[str, Any]] = []
    for s in within(arguments.limit, SETTINGS):
        r = measure(s)
        results.append(r)
        save(arguments.out, {"results": results})
        title = f"{r['name']}: {r['keep']} of {r['segments']} x {r['length']}"
        if "failed" in r:
            print(f"{title:52} FAILED: {r['failed']}", flush=True)
            continue
        print(
            f"{title:52} {r['ours_us']:8.1f} {r['topk_sort_us']:8.1f} {r['floor_us']:6.1f}",
            flush=True,
        )
    return 1 if any("failed" in r for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
