"""Episodes on disk, clips in memory.

A dataset is a folder of episodes, `episode-000000.npz` and so on, and a `dataset.json` that says how they were made.
An episode is one uncompressed npz, complete or absent: T actions and the T + 1 observations around them,

    pixels        uint8   [T + 1, h, w, 3]
    proprio       float32 [T + 1, S]
    actions       float32 [T, A]
    privileged/*  any     [T + 1, ...]     labels for probes and figures; no model reads them
    others        scalars that describe the episode: seed, task, object, policy

npz keeps a CRC of every member, which is how damage is found.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from worldmodel.files import replacing

FORMAT = 1
KEYS = ("pixels", "proprio", "actions")
NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)  # says nothing of a file's content

log = logging.getLogger(__name__)


# Episodes


def episode_path(folder: Path, index: int) -> Path:
    """Where episode `index` of a dataset lies."""
    return folder / f"episode-{index:06d}.npz"


def write_episode(path: Path, episode: Mapping[str, np.ndarray]) -> None:
    """Write one episode, complete or not at all; equal episodes give equal bytes.

    pixels uint8 [T + 1, h, w, 3], proprio [T + 1, S], actions [T, A] in [-1, 1], and whatever else has T + 1 rows, or none. Raises
    ValueError where one is missing or of another kind, where they do not fit together, or hold NaN.
    """
    arrays = {key: np.asarray(value) for key, value in episode.items()}
    if missing := [key for key in KEYS if key not in arrays]:
        raise ValueError(f"{path}: the episode has no {', '.join(missing)}; expected {', '.join(KEYS)}")
    pixels, actions = arrays["pixels"], arrays["actions"]
    for key, array in arrays.items():
        if array.dtype.kind not in "biufUS":
            raise ValueError(f"{path}: {key} is of {array.dtype}, expected real numbers, or a text")
        if key in ("proprio", "actions") and (array.ndim != 2 or array.dtype.kind != "f"):
            wanted = "float32 [T, A]" if key == "actions" else "float32 [T + 1, S]"
            raise ValueError(f"{path}: {key} is {array.dtype} {list(array.shape)}, expected {wanted}")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"{path}: pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [T + 1, h, w, 3] from 0 to 255")
    if actions.size and np.abs(actions).max() > 1 + 1e-6:
        raise ValueError(f"{path}: actions reach {np.abs(actions).max():.3g}, expected -1 to 1; divide them by your largest step")
    frames = len(pixels)
    for key, array in arrays.items():
        wanted = frames - (key == "actions")
        if array.ndim and len(array) != wanted:
            raise ValueError(f"{path}: {key} has {len(array)} rows, expected {wanted} for {frames} frames")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(f"{path}: NaN or infinity in {key}")
    with replacing(path) as file:
        np.savez(file, **arrays)


def read_episode(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of one episode, all or those named; raises ValueError naming the file where it is damaged."""
    with _opened(path) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [key for key in keys or () if key not in present]
        if not missing:
            return {key: _read_array(archive, key) for key in keys or present}
    raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(present))}")


def keys_of(path: Path) -> set[str]:
    """Names of the arrays of one episode."""
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def check_episode(path: Path) -> bool:
    """Whether the episode is there and undamaged; reads all of it."""
    try:
        read_episode(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def checksum(path: Path) -> str:
    """Identifies the content of an episode; read from the file's directory, so without reading the arrays."""
    with _opened(path) as archive:
        return _checksum(archive)


def _checksum(archive: zipfile.ZipFile) -> str:
    members = sorted(f"{info.filename} {info.file_size} {info.CRC:08x}" for info in archive.infolist())
    return hashlib.sha256("\n".join(members).encode()).hexdigest()[:16]


def _read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(archive.read(f"{key}.npy")), allow_pickle=False)


def _count_frames(archive: zipfile.ZipFile) -> int:
    with archive.open("pixels.npy") as member:  # reads the header alone
        np.lib.format.read_magic(member)
        return np.lib.format.read_array_header_1_0(member)[0][0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive of an episode; what goes wrong inside is damage, said with the file and the remedy."""
    if not path.exists():
        raise FileNotFoundError(f"episode {path} is missing; mend it with: {_command_of(path.parent)}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in NOT_DAMAGE:
            raise
        raise ValueError(f"episode {path} is damaged ({error}); mend it with: {_command_of(path.parent)}") from error


# Datasets


def write_recipe(
    folder: Path, command: str, config: Mapping, episodes: int, checksums: Sequence[str] | None = None, out: str = "."
) -> None:
    """Write dataset.json: how the episodes are made, and once all are there, their checksums.

    The command's --out is `out` of the folder. Raises ValueError where the checksums are not as many as the episodes.
    """
    if checksums is not None and len(checksums) != episodes:
        raise ValueError(f"got {len(checksums)} checksums of {episodes} episodes; expected one for each, data.checksum of its file")
    recipe = {"format": FORMAT, "command": command, "config": dict(config), "episodes": episodes}
    if out != ".":
        recipe["out"] = out
    recipe["checksums"] = None if checksums is None else list(checksums)
    with replacing(folder / "dataset.json") as file:
        file.write((json.dumps(recipe, indent=1) + "\n").encode())


def read_recipe(folder: Path) -> dict:
    """What dataset.json says; raises FileNotFoundError or ValueError, naming the remedy."""
    path = folder / "dataset.json"
    try:
        recipe = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no dataset in {folder} (it has no dataset.json); make one with: worldmodel collect --out {folder}, or of your own "
            "recordings with worldmodel.data.write_recipe"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run its collect command again") from None
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; collect the dataset again with this version")
    if missing := [key for key in ("command", "config", "episodes", "checksums") if key not in recipe]:
        raise ValueError(f"{path} has no {', '.join(missing)}; write it with worldmodel.data.write_recipe, or collect the dataset again")
    if recipe["checksums"] is not None and len(recipe["checksums"]) != recipe["episodes"]:
        raise ValueError(f"{path} has {len(recipe['checksums'])} checksums of {recipe['episodes']} episodes; write it again with worldmodel.data.write_recipe")
    return recipe


def fingerprint(recipes: Sequence[Mapping], checksums: Sequence[str]) -> str:
    """Identifies data by how it was made and by every episode's content."""
    text = json.dumps([[recipe["config"] for recipe in recipes], list(checksums)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _command_of(folder: Path) -> str:
    try:
        recipe = read_recipe(folder)
        return f"{recipe['command']} --out {os.path.normpath(folder / recipe.get('out', '.'))}"
    except (ValueError, FileNotFoundError, KeyError):
        return f"worldmodel collect --out {folder}"


@dataclass(frozen=True)
class Episode:
    """One episode of a dataset, not yet read."""

    path: Path
    frames: int  # T + 1
    checksum: str


@dataclass(frozen=True)
class Dataset:
    """The episodes of one or more folders, opened and checked but not read."""

    episodes: tuple[Episode, ...]
    recipes: tuple[dict, ...]  # dataset.json of each folder

    @classmethod
    def open(cls, folders: Path | str | Sequence[Path | str]) -> Dataset:
        """The episodes in these folders, in order; a set that is still being collected opens with what it has.

        Raises FileNotFoundError for a missing episode and ValueError for a damaged one, naming file and remedy.
        """
        folders = [folders] if isinstance(folders, (str, Path)) else folders
        if not folders:
            raise ValueError("no dataset named; expected at least one folder that worldmodel collect has made")
        recipes, episodes, known = [], [], set()
        for folder in map(Path, folders):
            if folder.resolve() in known:
                raise ValueError(f"{folder} is named twice: what is held out of it would be trained on; name each folder once")
            known.add(folder.resolve())
            recipes.append(read_recipe(folder))
            episodes.extend(_episodes_of(folder, recipes[-1]))
        return cls(tuple(episodes), tuple(recipes))

    @property
    def frames(self) -> int:
        """Number of frames in all episodes."""
        return sum(episode.frames for episode in self.episodes)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the data by how it was made and by every episode's content."""
        return fingerprint(self.recipes, [episode.checksum for episode in self.episodes])

    def split(self, holdout: float = 0.05) -> tuple[Dataset, Dataset]:
        """Training and held-out part: the last `holdout` of every folder's episodes, at least one, is held out."""
        if not 0 < holdout < 1:
            raise ValueError(f"holdout is {holdout}, expected a fraction between 0 and 1")
        kept, held = [], []
        for folder in dict.fromkeys(episode.path.parent for episode in self.episodes):
            episodes = [episode for episode in self.episodes if episode.path.parent == folder]
            last = len(episodes) - max(1, round(holdout * len(episodes)))
            kept += episodes[:last]
            held += episodes[last:]
        if not kept:
            raise ValueError(f"{len(self.episodes)} episodes are too few to hold some out; collect more")
        return replace(self, episodes=tuple(kept)), replace(self, episodes=tuple(held))

    def load(self, limit: int | None = None, keys: Sequence[str] = KEYS) -> Frames:
        """Read the arrays named by `keys` into memory; with `limit`, of that many episodes spread evenly over the set.

        Shows a progress bar where this takes longer than 2 s. Raises ValueError for an episode that is damaged, whose
        arrays do not fit to those of the others, or whose proprio or actions are not finite.
        """
        episodes = self.episodes
        if limit is not None and limit < len(episodes):
            if limit < 1:
                raise ValueError(f"limit is {limit}, expected at least 1 episode")
            episodes = tuple(episodes[i] for i in np.linspace(0, len(episodes) - 1, limit).round().astype(int))
        offsets = np.cumsum([0] + [episode.frames for episode in episodes])
        arrays: dict[str, np.ndarray] = {}
        for episode, start in zip(tqdm(episodes, desc="load", unit="episode", delay=2), offsets):
            for key, array in read_episode(episode.path, keys).items():
                if key not in arrays:
                    arrays[key] = np.zeros((offsets[-1], *array.shape[1:]), array.dtype)
                if array.shape[1:] != arrays[key].shape[1:]:
                    raise ValueError(
                        f"{episode.path}: {key} is {list(array.shape[1:])} per frame, expected "
                        f"{list(arrays[key].shape[1:])} as in {episodes[0].path}; collect both with one configuration"
                    )
                if not np.can_cast(array.dtype, arrays[key].dtype, "same_kind"):
                    raise ValueError(
                        f"{episode.path}: {key} is {array.dtype}, expected {arrays[key].dtype} as in {episodes[0].path}; write both alike"
                    )
                if key in ("proprio", "actions") and not np.isfinite(array).all():
                    raise ValueError(f"{episode.path}: {key} holds NaN or infinity; leave the episode out, or write it anew with finite numbers")
                arrays[key][start : start + episode.frames - (key == "actions")] = array
        return Frames(arrays, offsets, episodes)


def _episodes_of(folder: Path, recipe: Mapping) -> list[Episode]:
    recorded = recipe["checksums"]  # None while the set is being collected
    episodes = []
    for index in range(recipe["episodes"]):
        path = episode_path(folder, index)
        if recorded is None and not path.exists():
            continue
        with _opened(path) as archive:
            episodes.append(Episode(path, _count_frames(archive), _checksum(archive)))
        if recorded is not None and recorded[index] != episodes[-1].checksum:
            raise ValueError(f"episode {path} is not the one collected; mend it with: {_command_of(folder)}")
    if not episodes:
        raise ValueError(f"dataset {folder} has no episodes yet; collect them with: {_command_of(folder)}")
    if recorded is None:
        log.warning("%s is unfinished: %d of %d episodes", folder, len(episodes), recipe["episodes"])
    return episodes


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of many episodes in memory, one behind the other, F in all.

    `actions[f]` leads from frame f to f + 1, and is zero at the last frame of an episode.
    """

    arrays: Mapping[str, np.ndarray]  # each [F, ...]
    offsets: np.ndarray  # int64 [E + 1], where episodes begin, and F
    episodes: tuple[Episode, ...]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [F, h, w, 3]."""
        return self.arrays["pixels"]

    @property
    def proprio(self) -> np.ndarray:
        """float32 [F, S]."""
        return self.arrays["proprio"]

    @property
    def actions(self) -> np.ndarray:
        """float32 [F, A]."""
        return self.arrays["actions"]

    @cached_property
    def episode_of(self) -> np.ndarray:
        """int64 [F]: which episode a frame belongs to."""
        return np.repeat(np.arange(len(self.episodes)), np.diff(self.offsets))

    def clip_index(self, batch: int, length: int, stride: int, rng: np.random.Generator) -> np.ndarray:
        """Frames [batch, length] of clips drawn uniformly from all that lie within one episode, `stride` apart."""
        last = np.cumsum(self._starts(length, stride))
        drawn = rng.integers(last[-1], size=batch)  # of all starts, numbered through
        episode = np.searchsorted(last, drawn, side="right")
        start = self.offsets[episode + 1] - (length - 1) * stride - (last[episode] - drawn)
        return start[:, None] + stride * np.arange(length)

    def every_clip(self, length: int, stride: int = 1) -> np.ndarray:
        """Frames [N, length] of every clip there is, in order."""
        starts = [o + np.arange(n) for o, n in zip(self.offsets, self._starts(length, stride))]
        return np.concatenate(starts)[:, None] + stride * np.arange(length)

    def sample_clips(
        self, batch: int, length: int, stride: int, rng: np.random.Generator, keys: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Random clips: of each of `keys` (all but privileged ones by default) [batch, length, ...].

        `actions` are those between the first and last frame, [batch, (length - 1) * stride, A]. Clips of 4 frames of
        96 x 96 come at 130,000 clips/s from one core.
        """
        index = self.clip_index(batch, length, stride, rng)  # [B, length]
        between = index[:, :1] + np.arange((length - 1) * stride)
        if keys is None:
            keys = [key for key in self.arrays if not key.startswith("privileged/")]
        return {key: self.arrays[key][between if key == "actions" else index] for key in keys}

    def _starts(self, length: int, stride: int) -> np.ndarray:
        """How many clips begin in each episode, [E]."""
        if length < 1 or stride < 1:
            raise ValueError(f"clips of {length} frames with stride {stride}: expected both to be at least 1")
        starts = np.maximum(np.diff(self.offsets) - (length - 1) * stride, 0)
        if not starts.any():
            raise ValueError(
                f"no episode has {(length - 1) * stride + 1} frames, as clips of {length} with stride {stride} need; "
                f"the longest has {np.diff(self.offsets).max()}"
            )
        return starts
