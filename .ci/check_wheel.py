"""Check what is in the built wheel: python .ci/check_wheel.py FILE.whl."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparsevila_compile"


def sources() -> set[str]:
    """Every Python file that must be in the wheel, by its path there."""
    found = {f"{PACKAGE}/py.typed"}
    for folder, prefix in ((PACKAGE, ""), ("passes", PACKAGE), ("kernels", PACKAGE)):
        for file in (ROOT / folder).rglob("*.py"):
            found.add(str(Path(prefix) / file.relative_to(ROOT)))
    return found


def main(path: str) -> int:
    with zipfile.ZipFile(path) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}
    top = {n.split("/")[0] for n in names}
    unexpected = {t for t in top if t != PACKAGE and not t.endswith(".dist-info")}
    missing = {s for s in sources() if s not in names}
    stray = {n for n in names if n.startswith(PACKAGE + "/") and n not in sources()}
    for what, found in (
        ("top-level names", unexpected),
        ("missing files", missing),
        ("stray files", stray),
    ):
        if found:
            print(f"{path}: {what}: {', '.join(sorted(found))}", file=sys.stderr)
    if unexpected or missing or stray:
        return 1
    print(f"{Path(path).name}: {len(names)} files, top level: {', '.join(sorted(top))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
