"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the target's place when the block ends well.

    It is made beside the target. If the block raises, it is removed and the target is as it was; if
    the process is killed, it stays behind under a hidden name and the next call removes it.

    Raises:
        OSError: the directory cannot be made or moved.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    folder = _beside(target)
    try:
        yield folder
        folder.chmod(0o755)
        _swap(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}."


def _beside(target: Path) -> Path:
    """A new directory next to the target, named after this process."""
    prefix = f"{_prefix(target)}{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=target.parent))


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left beside the target."""
    head = _prefix(target)
    for path in target.parent.iterdir():
        if path.name.startswith(head) and path.name.endswith(SUFFIX):
            maker = path.name.removeprefix(head).split(".")[0]
            only_copy = (path / "old").exists() and not target.exists()
            if maker.isdecimal() and not _runs(int(maker)) and not only_copy:
                shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _swap(folder: Path, target: Path) -> None:
    """Put the new directory in its place; the old one, if any, ends in ``folder`` or is removed."""
    if not target.exists():
        os.rename(folder, target)
        return
    if _exchange(folder, target):
        return
    # Two steps, where the file system has no other way. A kill between them leaves the old
    # directory in `aside`, where it stays until the target exists again.
    aside = _beside(target)
    try:
        os.rename(target, aside / "old")
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(aside / "old", target)
            raise
        shutil.rmtree(aside / "old", ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            aside.rmdir()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(rename(here, os.fsencode(a), here, os.fsencode(b), exchange)) == 0
