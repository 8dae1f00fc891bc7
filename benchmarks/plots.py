"""A plot for every table of docs/performance.md, from the newest results of each benchmark.

    python -m benchmarks.plots [--results benchmarks/results] [--out docs/plots]

Needs matplotlib. Kernels: how much of the floor's speed each side reaches, one group of bars a
shape. Headline: seconds to the first token and milliseconds a token, one group a setting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """One shape: microseconds by side, and the floor in microseconds."""

    label: str
    times: dict[str, float]
    floor: float


def _sides(row: Row, names: dict[str, str]) -> dict[str, float]:
    return {side: row[key] for key, side in names.items() if isinstance(row.get(key), int | float)}


def _w4a16(row: Row) -> Group:
    label = f"{row['layer']} {row['linear']}, {row['rows']} rows"
    return Group(label, row["microseconds"], row["floor"])


def _w8a8(row: Row) -> Group:
    label = f"{row['name']}, {row['rows']} rows"
    return Group(label, row["microseconds"], row["floor"])


def _column_reduce(row: Row) -> Group:
    names = {"ours_us": "ours", "ours_with_lse_us": "ours, with log-sum-exp"}
    return Group(
        row["name"], _sides(row, names | {"flash_colsum_us": "flash-colsum"}), row["floor_us"]
    )


def _select_tokens(row: Row) -> Group:
    names = {"ours_us": "ours", "topk_sort_us": "torch topk and sort"}
    return Group(row["name"], _sides(row, names), row["floor_us"])


def _decode_attention(row: Row) -> Group:
    what = row["chosen"] or "all"
    names = {
        "ours_us": "ours",
        "cudnn_us": "cuDNN over everything",
        "cudnn_packed_us": "cuDNN over the chosen, packed",
    }
    label = f"{row['name']}, B={row['batch']}, {what} of {row['cached']}"
    return Group(label, _sides(row, names), row["floor_us"])


def _prefill_attention(row: Row) -> Group:
    times = {"ours": row["us"]["median"]}
    times |= {name: r["us"]["median"] for name, r in row.get("rivals", {}).items() if "us" in r}
    return Group(row["name"], times, row["floor_us"])


def _fused(row: Row) -> Group:
    label = f"{row['op']}, {row['shape']}, {row['tokens']} tokens"
    return Group(label, _sides(row, {"ours": "ours", "model": "torch ops"}), row["floor"])


KERNELS: dict[str, Callable[[Row], Group]] = {
    "w4a16-linear": _w4a16,
    "w8a8-linear": _w8a8,
    "column-reduce": _column_reduce,
    "select-tokens": _select_tokens,
    "decode-attention": _decode_attention,
    "prefill-attention": _prefill_attention,
    "fused-elementwise": _fused,
}


def groups(name: str, data: dict[str, Any]) -> list[Group]:
    """The timed shapes of one benchmark's file."""
    rows: list[Row] = data["results"] if "results" in data else data["rows"]
    timed = [r for r in rows if ("failed" not in r and "refused" not in r) or r.get("microseconds")]
    return [g for g in map(KERNELS[name], timed) if g.times]


def newest(results: Path, name: str) -> Path | None:
    """The newest file of a benchmark; names start with the date."""
    found = sorted(results.glob(f"*-h200-{name}.json"))
    return found[-1] if found else None


def kernel_plot(name: str, found: list[Group], file: Path) -> None:
    """Bars of the share of the floor's speed."""
    from matplotlib import pyplot

    sides = list(dict.fromkeys(s for g in found for s in g.times))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.17 * len(found) * (len(sides) + 1)))
    high = 0.8 / len(sides)
    for i, side in enumerate(sides):
        at = [
            (n + i * high, g.floor / g.times[side]) for n, g in enumerate(found) if side in g.times
        ]
        axes.barh([y for y, _ in at], [x for _, x in at], high, label=side)
    axes.set_yticks([n + 0.4 - high / 2 for n in range(len(found))], [g.label for g in found])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("share of the floor's speed (1: the floor)")
    axes.set_title(name.replace("-", "_"))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def headline_plot(results: list[Row], file: Path) -> None:
    """Seconds to the first token and milliseconds a token, by setting and side."""
    from matplotlib import pyplot

    settings = list(dict.fromkeys(r["setting"] for r in results))
    sides = list(dict.fromkeys(r["side"] for r in results))
    figure, both = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.2 * len(settings) * (len(sides) + 1)))
    high = 0.8 / len(sides)
    for axes, key, title in zip(
        both, ("ttft_s", "decode_ms"), ("first token, s", "a token, ms"), strict=True
    ):
        for i, side in enumerate(sides):
            mine = {r["setting"]: r[key] for r in results if r["side"] == side}
            at = [n + i * high for n, s in enumerate(settings) if s in mine]
            axes.barh(at, [mine[s] for s in settings if s in mine], high, label=side)
        axes.set_yticks([n + 0.4 - high / 2 for n in range(len(settings))], settings)
        axes.invert_yaxis()
        if key == "ttft_s":  # spans two orders of magnitude
            axes.set_xscale("log")
        axes.set_title(title)
    both[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    given = parser.parse_args()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plots"  # the same figures give the same file
    given.out.mkdir(parents=True, exist_ok=True)
    for name in KERNELS:
        file = newest(given.results, name)
        if file is None:
            print(f"{name}: no results in {given.results}")
            continue
        try:
            found = groups(name, json.loads(file.read_text()))
        except KeyError as missing:
            print(f"{name}: {file.name} is of an older form, without {missing}; not plotted")
            continue
        kernel_plot(name, found, given.out / f"{name}.svg")
        print(f"{name}: {file.name}")
    for file in sorted(given.results.glob("*-h200-headline*.json")):
        kind = file.stem.split("-h200-")[1]
        headline_plot(json.loads(file.read_text())["results"], given.out / f"{kind}.svg")
        print(f"{kind}: {file.name}")


if __name__ == "__main__":
    main()
