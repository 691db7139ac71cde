"""Files that are complete or absent, and folders that belong to one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` once it is complete and on disk, and leaves nothing otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a killed writer has left this file behind."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_leftovers(folder: Path, shared: bool = False) -> None:
    """Delete what killed writers have left behind in `folder`; in a shared one, what a living process may be writing stays."""
    for path in filter(is_leftover, folder.iterdir()):
        writer = path.name.split(".")[-2]
        if not (shared and writer.isdigit() and _lives(int(writer))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextlib.contextmanager
def owned(folder: Path, command: str) -> Iterator[Path]:
    """The folder, made if need be, while no other process owns it.

    Raises NotADirectoryError where it is a file, and FileExistsError where another process writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = f"another {command} is writing to {folder}; wait for it or choose another --out"
            raise FileExistsError(told) from None
        yield folder
    finally:
        os.close(handle)


@contextlib.contextmanager
def fresh(folder: Path, command: str) -> Iterator[Path]:
    """The same of a folder in which nothing is yet. Raises FileExistsError where there is something, too."""
    with owned(folder, command):
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; choose another --out")
        yield folder
