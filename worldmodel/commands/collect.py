"""Run scripted experts in the simulator and keep their episodes; or play in an environment of others (--env.id).

Episode i depends on the configuration and on seed + i alone, so neither the number of workers nor an interruption
changes a byte: the same command goes on where it was stopped, and mends what is damaged or missing.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from envs.foreign import Foreign
from worldmodel import data, files
from worldmodel.commands import cli, workers

if TYPE_CHECKING:
    from envs.run import Record

OBJECTS = {"box": ("box",), "cup": ("cup",), "can": ("can",), "both": ("box", "cup")}
Task = Literal["reach", "grasp", "reach-with-object", "pick-place", "pick-place-fragile"]
Level = Literal[
    "none", "mild", "hidden", "slips", "strong", "camera", "light", "colours", "distractors", "occluder", "heavy", "slippery", "moved-post"
]  # fmt: skip
BEFORE = 3  # steps that a fork has before it
TRIES = 8  # of each step, where forks are kept
BATCH = 4  # episodes that a worker collects at a go, writing each while it records the next

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """What to collect, and where to."""

    out: Path
    """folder of the dataset; one that holds a part of the same dataset is completed"""
    task: Task = "pick-place"
    """what the experts try to do"""
    object: Literal["box", "cup", "can", "both"] = "box"
    """what they do it with; both: by turns"""
    policy: Literal["expert", "varied", "noisy", "failing", "hasty", "careful", "play", "mixture", "random", "nothing"] = "mixture"
    """who acts; mixture: of varied, noisy, failing and play, drawn anew for every episode; hasty: takes the shortest way, aslant
    onto the object; careful: high and slow where something could be hurt, in pick-place and pick-place-fragile"""
    episodes: int = 100
    """number of episodes"""
    seed: int = 0
    """seed of the first episode; episode i has seed + i"""
    workers: int = os.cpu_count() or 1
    """number of processes"""
    image_size: int = 96
    """height and width of the images (pixels)"""
    cameras: tuple[str, ...] = ("front",)
    """views, side by side in one image"""
    action_dim: Literal[4, 7] = 4
    """4: dx, dy, dz, gripper; 7: with rotation, which play, noisy and failing experts make use of"""
    max_steps: int = 40
    """length of an episode (steps of 0.2 s)"""
    stop_on_success: bool = True
    """end an episode at its success"""
    randomization: Level = "none"
    """how much cameras (2 cm along each axis), light and distractors vary between episodes (mild), what no picture tells, mass and grip, as well
    (hidden), a grip that holds or does not (slips), colours, mass and friction as well (strong), or one thing: the shifts"""
    visibility: bool = False
    """also record how many pixels show the object, as privileged/object_pixels"""
    forks: int = 0
    """ends to keep of the step of an episode that branches most, where mass and grip decide and no picture tells; each is an episode of its
    own, with the three steps before it, and `episodes` counts them (0: whole episodes)"""
    env: Foreign = Foreign()
    """an environment of others instead of the robot; task, object, cameras, action-dim, randomization, visibility and forks are the robot's.
    Who acts there: play (the default), random or nothing; where `envs.peers` knows it, also expert, noisy or mixture, the default then"""

    def __post_init__(self):
        for name in ("episodes", "workers", "image_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")
        if self.randomization == "moved-post":
            raise ValueError("moved-post is for benchmarks: data's pictures are drawn after an episode, with all posts where they end")
        if self.policy == "careful" and not self.task.startswith("pick-place"):
            raise ValueError(f"the careful expert picks and places; got --task {self.task}, expected pick-place or pick-place-fragile")
        check_environment(self, ("task", "object", "cameras", "randomization", "action_dim", "visibility", "forks"))
        if self.forks and not 2 <= self.forks <= TRIES:
            raise ValueError(f"forks is {self.forks}, expected 2 to {TRIES} ends of a step, or 0 for whole episodes")
        if self.forks and self.max_steps <= BEFORE:
            raise ValueError(f"forks need max-steps above {BEFORE}, got {self.max_steps}")
        if self.forks and self.randomization not in ("hidden", "slips", "strong", "heavy", "slippery"):
            raise ValueError(f"nothing branches under --randomization {self.randomization}: give one that draws mass or grip, such as slips")
        if self.forks and self.stop_on_success:
            raise ValueError("forks are looked for in all of an episode, however soon it succeeds: give --no-stop-on-success with them")
        if self.env.id and self.policy == "mixture":
            object.__setattr__(self, "policy", self.env.players[0])
        if self.env.id and self.policy not in self.env.players:
            raise ValueError(f"in {self.env.id} {', '.join(self.env.players)} can act, not {self.policy}")


def check_environment(config, ours: tuple[str, ...]) -> None:
    """Raise ValueError where a config says something, in fields `ours`, of the robot's tasks, but has an environment of others; or the reverse."""
    said = [f"--{name.replace('_', '-')}" for name in ours if getattr(config, name) != getattr(type(config), name)]
    if config.env.id and said:
        raise ValueError(f"{said[0]} is of the robot's tasks, and {config.env.id} does not heed it; leave it out")
    theirs = [f"--env.{f.name.replace('_', '-')}" for f in dataclasses.fields(config.env) if getattr(config.env, f.name) != f.default]
    if theirs and not config.env.id:
        raise ValueError(f"{theirs[0]} is of an environment of others: name it, --env.id, or leave it out")


def run(config: Config) -> dict:
    """Collect what is missing of the dataset, and return what it holds and how fast it grew."""
    start, steps = time.perf_counter(), 0
    _refuse_another(config)
    count = min(config.workers, config.episodes)
    with workers.pool(count, 1, _try_out, config) as pool, files.owned(config.out, "collect") as folder:
        _refuse_another(config)  # who held the folder until now may have written there
        _begin(config, folder)
        missing = _missing(config, folder)
        bar = tqdm(total=config.episodes, initial=config.episodes - len(missing), desc="collect", unit="episode")
        with bar:
            size = max(1, min(config.forks or BATCH, len(missing) // count))
            batches = [missing[i : i + size] for i in range(0, len(missing), size)]
            for future in as_completed([pool.submit(_collect, config, folder, batch) for batch in batches]):
                lengths = workers.result(future)
                steps += sum(lengths)
                bar.set_postfix_str(f"{steps / (time.perf_counter() - start):.0f} steps/s", refresh=False)
                bar.update(len(lengths))
        seconds = time.perf_counter() - start
        checksums = [data.checksum(data.episode_path(folder, i)) for i in range(config.episodes)]
        data.write_recipe(folder, _command(config), _recipe(config), config.episodes, checksums)
    return _summary(config, len(missing), steps, seconds)


def report(result: dict) -> str:
    """The same for people."""
    return (
        "{out}: {episodes} episodes ({successes} of them successes), {frames} frames, fingerprint {fingerprint}\n"
        "new: {collected} episodes, {steps} steps in {seconds:.1f} s, {steps_per_second:.0f} steps/s"
    ).format(**result)


def _try_out(config: Config) -> None:
    """Make this worker's environments and draw once."""
    if config.env.id:
        _foreign(config).reset(seed=config.seed)
        return
    for object in OBJECTS[config.object]:
        env = _env(config, object)
        env.reset(seed=config.seed)
        env.scene.render()
    gc.freeze()  # or the collector goes through all that was imported again and again


def _refuse_another(config: Config) -> None:
    """Raise FileExistsError where --out holds something else than a part of this dataset."""
    folder = config.out
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose another --out")
    if not (folder / "dataset.json").exists():
        if others := sorted(path.name for path in folder.iterdir() if not files.is_leftover(path)):
            raise FileExistsError(f"{folder} holds {others[0]}, which is not of a dataset; choose another --out")
        return
    recipe = data.read_recipe(folder)
    there = {"episodes": recipe["episodes"], **recipe["config"]}
    wanted = {"episodes": config.episodes, **_recipe(config)}
    others = [key for key in {**wanted, **there} if there.get(key) != wanted.get(key)]
    if others:
        differences = ", ".join(f"{key} {there.get(key)} instead of {wanted.get(key)}" for key in others)
        raise FileExistsError(f"{folder} holds another dataset, with {differences}; choose another --out")


def _begin(config: Config, folder: Path) -> None:
    """Remove what a killed collect has left, and write the recipe where there is none."""
    files.remove_leftovers(folder)
    if not (folder / "dataset.json").exists():
        data.write_recipe(folder, _command(config), _recipe(config), config.episodes)


def _recipe(config: Config) -> dict:
    """What the episodes' bytes depend on, beside their number."""
    recipe = dataclasses.asdict(config)
    for key in ("out", "workers", "episodes"):
        del recipe[key]
    if not config.visibility:  # one more label: without it, the dataset is what it is for those who do not know of it
        del recipe["visibility"]
    if not config.forks:
        del recipe["forks"]
    if config.env.id:
        recipe["env"] = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe["env"].items()}
    else:
        del recipe["env"]
    return {**recipe, "cameras": list(config.cameras)}


def _command(config: Config) -> str:
    """The command that makes this dataset, but for --out."""
    recipe = _recipe(config)
    if env := recipe.pop("env", None):
        recipe["env"] = {key: value for key, value in env.items() if value != []}
    return cli.told("collect", {"episodes": config.episodes, **recipe})


def _missing(config: Config, folder: Path) -> list[int]:
    """Indices of episodes that are not there, or damaged."""
    paths = [data.episode_path(folder, i) for i in range(config.episodes)]
    there = [path for path in paths if path.exists()]
    sound = {path for path in tqdm(there, desc="check", unit="episode", delay=2) if data.check_episode(path)}
    for path in set(there) - sound:
        log.warning("%s is damaged; collecting it again", path)
    return [i for i, path in enumerate(paths) if path not in sound]


def _collect(config: Config, folder: Path, batch: list[int]) -> list[int]:
    """Collect a few episodes and return their numbers of steps; all of them are on disk then."""
    with ThreadPoolExecutor(1) as writer:  # which waits for the disk while the next episode is recorded
        writes = []
        for index in batch:
            episode = record(config, config.seed + index)
            writes.append(writer.submit(_write, data.episode_path(folder, index), episode))
    return [write.result() for write in writes]


def _write(path: Path, episode: dict[str, np.ndarray]) -> int:
    data.write_episode(path, episode)
    return len(episode["actions"])


def record(config: Config, seed: int) -> dict[str, np.ndarray]:
    """One episode as data.write_episode takes it; it depends on the configuration and the seed alone."""
    from envs import run
    from envs.foreign import policy as player
    from envs.forks import outcome

    if config.env.id:
        env = _foreign(config)
        policy = player(config.policy, env, np.random.default_rng((seed, 1)))
        return as_data(run.rollout(env, lambda obs, info: policy(info), seed), config.env.id, "", config.policy)
    shown = {}
    if config.forks:
        which, seed = (seed - config.seed) % config.forks, config.seed + (seed - config.seed) // config.forks
        env, episode, found = _forked(config, seed)
        episode = outcome(episode, found, which, BEFORE)
        shown["privileged/fork"] = np.full(len(episode.infos), seed)
    else:
        env, policy = _acting(config, seed)
        episode = run.rollout(env, lambda obs, info: policy(info), seed)
    qpos = episode.obs["qpos"]
    drawn = dataclasses.replace(episode, obs={"pixels": env.scene.film(qpos), "proprio": episode.obs["proprio"]})
    if config.visibility:
        shown["privileged/object_pixels"] = env.scene.object_pixels(qpos)
    return as_data(drawn, config.task, env.config.object, config.policy, shown)


def _acting(config: Config, seed: int):
    """The environment of an episode, and who acts in it."""
    from envs import experts

    env = _env(config, OBJECTS[config.object][seed % len(OBJECTS[config.object])])
    return env, experts.make_policy(config.policy, env.config, np.random.default_rng((seed, 1)))  # not the scene's stream


@functools.lru_cache(1)  # all its ends are kept, one after the other
def _forked(config: Config, seed: int):
    """The environment, the episode of a seed and what its steps might have come to; drawn last, so that the scene still looks as it did."""
    from envs.forks import forked

    env, policy = _acting(config, seed)
    return env, *forked(env, policy, seed, TRIES)


def as_data(episode: Record, task: str, object: str, policy: str, shown: Mapping[str, np.ndarray] = {}) -> dict[str, np.ndarray]:
    """An episode with its pictures, and labels `shown` of these, as data.write_episode takes it."""
    privileged = [key for key in episode.infos[0] if key.startswith("privileged/")]
    return {
        **episode.obs,
        "actions": episode.actions,
        **{key: np.array([info[key] for info in episode.infos]) for key in privileged},
        **shown,
        "privileged/unsafe": np.array([len(info["unsafe"]) for info in episode.infos]),  # events in the step before
        "seed": np.int64(episode.seed),
        "task": task,
        "object": object,
        "policy": policy,
        "success": episode.success,
    }


@functools.lru_cache
def _env(config: Config, object: str):
    """The environment of this process for one kind of object, used for all its episodes."""
    import envs

    same = cli.shared(config, envs.EnvConfig)
    return envs.make(envs.EnvConfig(**{**same, "object": object, "render_goals": False, "render_observations": False}))


@functools.lru_cache
def _foreign(config: Config):
    """The environment of others of this process; it knows no goals."""
    from envs.foreign import make

    return make(config.env, config.image_size, config.max_steps, config.stop_on_success, goals=False)


def _summary(config: Config, collected: int, steps: int, seconds: float) -> dict:
    """What the dataset holds, and what this run has added."""
    dataset = data.Dataset.open(config.out)
    successes = sum(bool(data.read_episode(episode.path, ("success",))["success"]) for episode in dataset.episodes)
    return {
        "out": str(config.out),
        "episodes": len(dataset.episodes),
        "frames": dataset.frames,
        "fingerprint": dataset.fingerprint,
        "successes": successes,
        "collected": collected,
        "steps": steps,
        "seconds": seconds,
        "steps_per_second": steps / seconds,
    }
