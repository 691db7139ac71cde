"""Processes that work for a command."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from worldmodel.commands import cli


@contextlib.contextmanager
def pool(count: int, threads: int, prepare: Callable, *args) -> Iterator[ProcessPoolExecutor]:
    """`count` new processes of `threads` processor threads each; what is still to do at the end is cancelled.

    `prepare(*args)` runs as often as there are processes before any of them is handed out, and what it raises is raised
    here: what fails, fails before anything is written. The processes end with this one, even when it is killed.
    """
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent)
    own = {"OMP_NUM_THREADS": str(threads)}  # which a process reads when it starts
    if threads > 1 and count * threads > (os.cpu_count() or 1):
        # threads that spin while they wait take the cores from those they wait for
        own["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    try:
        with _environment(own):
            prepared = [executor.submit(prepare, *args) for _ in range(count)]
        for future in prepared:
            result(future)
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(own: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _end_with_parent() -> None:
    """Have this process end at once when its parent does, even one that is killed."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def result(future: Future):
    """What a worker returned; bad input that our code noticed there is raised as if it had been noticed here."""
    try:
        return future.result()
    except (ValueError, FileNotFoundError) as error:
        frames = re.findall(r'File "(.+?)", line.*\n(?= *(\w*))', str(error.__cause__))  # of the worker's traceback
        if frames and cli.noticed(*frames[-1]):
            raise type(error)(str(error)) from error
        raise
