"""Episodes of a benchmark: played here or in worker processes, and kept as they are finished.

A `config` is that of `worldmodel bench`, with every field filled in.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worldmodel import data, files
from worldmodel.commands import workers
from worldmodel.commands.collect import as_data

if TYPE_CHECKING:
    from worldmodel.commands.policies import Player


@dataclass
class Log:
    """Finished episodes on disk: a line with the config, then one for each episode."""

    path: Path
    episodes: dict[int, dict]  # by seed

    @classmethod
    def open(cls, path: Path, identity: dict) -> Log:
        """Start a log, or go on with that of the same run; raises FileExistsError where the folder holds something else."""
        folder = path.parent
        files.remove_leftovers(folder)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last newline is torn
        if not lines:
            if others := sorted(p.name for p in folder.iterdir() if p != path):
                raise FileExistsError(f"{folder} holds {others[0]}, which is not of this benchmark; choose another --out")
            log = cls(path, {})
            path.write_bytes(b"")
            log._write({"config": identity})
            return log
        try:
            there, *episodes = [json.loads(line) for line in lines]
            there, episodes = there["config"], {episode["seed"]: episode for episode in episodes}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; delete it to start anew, or choose another --out") from None
        keys = [key for key in {**identity, **there} if identity.get(key) != there.get(key) and key != "model"]  # its hash says which
        if keys:
            told = ", ".join(f"{key} {there.get(key)} instead of {identity.get(key)}" for key in keys)
            raise FileExistsError(f"{folder} holds another run, with {told}; choose another --out")
        os.truncate(path, sum(len(line) + 1 for line in lines))
        return cls(path, episodes)

    def append(self, episode: dict) -> None:
        """Keep a finished episode."""
        self._write(episode)
        self.episodes[episode["seed"]] = episode

    def _write(self, value: dict) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def played(config, player: Player, seeds: list[int]) -> Iterator[dict]:
    """Play the episodes of these seeds, here or in worker processes; yields each when it is over."""
    if config.workers == 1 or len(seeds) < 2:
        for seed in seeds:
            yield _play(config, player, seed)
        return
    with workers.pool(min(config.workers, len(seeds)), config.threads, prepare, config) as pool:
        for future in as_completed([pool.submit(_play_there, config, seed) for seed in seeds]):
            yield workers.result(future)


def prepare(config) -> None:
    """Make the player of this worker process."""
    player_of(config)


def _play_there(config, seed: int) -> dict:
    return _play(config, player_of(config), seed)


@functools.lru_cache
def player_of(config) -> Player:
    """The player of this worker process."""
    from worldmodel.commands.policies import Player

    return Player(config)


def path_of(config, seed: int) -> Path:
    """Where the episode of a seed is kept."""
    return data.episode_path(config.out / "data", seed - config.seed)


def recorded(config, seed: int) -> bool:
    """Whether the episode of a seed is kept, and undamaged."""
    return path_of(config, seed).exists() and data.check_episode(path_of(config, seed))


def _play(config, player: Player, seed: int) -> dict:
    """Play one episode, film it where it is one of the first, and keep it where that is asked for."""
    from worldmodel.commands.film import write_film

    episode, film, record = player.play(seed)
    if config.record:
        data.write_episode(path_of(config, seed), as_data(record, episode["task"], episode["object"], config.policy))
    if seed - config.seed < config.video:
        write_film(config.out / f"episode-{seed}.webp", film)
    return episode
