"""What a model imagines on held-out episodes: open-loop errors, and whether its grasps are real."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import envs
from envs import experts, run
from worldmodel.commands.bench import wilson
from worldmodel.interface import Context, Features
from worldmodel.model import LatentModel

HORIZON = 10  # steps of 0.2 s
STEPS = 30  # of an episode
RISE = 0.05  # m, of the hand, after which one looks for the object
BESIDE, ABOVE = 0.05, 0.05  # m, how far from the object's middle a closing hand still is after it
MOVED = 0.01  # m
DENSITY = 32  # rows of a view at which one looks what it shows


@dataclass(frozen=True)
class Recorded:
    """An episode of T actions, as the model sees it, and what is where."""

    patches: Tensor  # float32 [T + 1, P, D]
    proprio: Tensor  # float32 [T + 1, S]
    actions: Tensor  # float32 [T, A]
    robot: np.ndarray  # [T + 1, P], share of the patch that shows the robot
    thing: np.ndarray  # [T + 1, P], share that shows the object
    tcp: np.ndarray  # [T + 1, 3], m
    place: np.ndarray  # [T + 1, 3], m, of the object
    opening: np.ndarray  # [T + 1], m


def object_of(seed: int) -> str:
    """Box and cup by turns."""
    return ("box", "cup")[seed % 2]


@functools.lru_cache
def environment(
    object: str, size: int, cameras: tuple[str, ...], action_dim: int, render: bool, randomization: str = "none"
) -> envs.PandaEnv:
    """The environment for one kind of object, used for all its episodes; it draws at once, or `Scene.film` later."""
    config = envs.EnvConfig(
        "pick-place", object, size, cameras, action_dim, STEPS, render_goals=render, render_observations=render,
        stop_on_success=False, randomization=randomization,
    )  # fmt: skip
    return envs.make(config)


def record(world: LatentModel, cameras: tuple[str, ...], seed: int) -> Recorded:
    """The episode of a seed, with whatever policy `collect`'s mixture draws for it."""
    size, grid = world.encoder.config.image_size, world.encoder.config.grid
    env = environment(object_of(seed), size, cameras, world.action_dim, False)
    policy = experts.make_policy("mixture", env.config, np.random.default_rng((seed, 1)))
    episode = run.rollout(env, lambda obs, info: policy(info), seed)
    seen = world.encode({"pixels": env.scene.film(episode.obs["qpos"]), "proprio": episode.obs["proprio"]})
    robot, thing = (pooled(shown, grid) for shown in env.scene.layout(episode.obs["qpos"], max(1, size // DENSITY)))
    return Recorded(
        seen.patches, seen.proprio, torch.from_numpy(episode.actions), robot, thing, episode.privileged("tcp_pos"),
        episode.privileged("object_pos"), episode.privileged("opening"),
    )  # fmt: skip


def pooled(shown: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Shares [n, P] of the patches of a grid of which points [n, rows, columns] say yes."""
    rows, columns = (np.eye(n)[np.arange(m) * n // m] for n, m in zip(grid, shown.shape[1:]))  # [points, patches]
    shares = np.einsum("nrc,ri,cj->nij", shown, rows / rows.sum(0), columns / columns.sum(0), optimize=True)
    return shares.reshape(len(shown), -1)


def imagine(world: LatentModel, episodes: list[Recorded], starts: list[tuple[int, int]], horizon: int) -> list[Tensor]:
    """What is imagined from each of `starts` (episode, frame), under the actions that were taken: patches [horizon, P, D].

    The context is the frames up to it, z the prior's mean; where the episode ends first, actions of zero follow.
    """
    past = world.max_context - 1
    groups: dict[int, list[int]] = {}
    for i, (_, t) in enumerate(starts):
        groups.setdefault(min(t, past), []).append(i)  # contexts of one length go together
    out: list = [None] * len(starts)
    for length, group in groups.items():
        for part in (group[k : k + 32] for k in range(0, len(group), 32)):
            window = [(episodes[starts[i][0]], starts[i][1]) for i in part]
            features = Features(*(
                torch.stack([values(e)[t - length : t + 1] for e, t in window])
                for values in (lambda e: e.patches, lambda e: e.proprio)
            ))  # fmt: skip
            context = Context(features, torch.stack([e.actions[t - length : t] for e, t in window]))
            actions = torch.zeros(len(part), 1, horizon, world.action_dim)
            for row, (e, t) in zip(actions, window):
                taken = e.actions[t : t + horizon]
                row[0, : len(taken)] = taken
            z = world.sample_z((len(part), 1, 1, horizon), None)
            for i, patches in zip(part, world.rollout(context, actions, z).patches[:, 0, 0]):
                out[i] = patches
    return out


def open_loop(world: LatentModel, episodes: list[Recorded]) -> dict[str, dict[str, list[float]]]:
    """L1 of what is imagined, and of the last frame, per horizon, in patches that show something before or after.

    Of what appears elsewhere, where nothing was nor is, only `anything` tells.
    """
    starts = [
        (i, t) for i, e in enumerate(episodes) for t in range(world.max_context - 1, len(e.actions) - HORIZON + 1, 9)
    ]

    def moved(e: Recorded, t: int, h: int) -> bool:
        return np.linalg.norm(e.place[t + h] - e.place[t]) > MOVED

    shown = {
        "anything": lambda e, t, h: np.ones(e.robot.shape[1], bool),
        "the robot": lambda e, t, h: np.maximum(e.robot[t], e.robot[t + h]) >= 0.25,
        "the object": lambda e, t, h: np.maximum(e.thing[t], e.thing[t + h]) >= 0.1,
        "a moved object": lambda e, t, h: (np.maximum(e.thing[t], e.thing[t + h]) >= 0.1) & moved(e, t, h),
    }
    sums = {name: np.zeros((3, HORIZON)) for name in shown}
    for (i, t), guess in zip(starts, imagine(world, episodes, starts, HORIZON)):
        e = episodes[i]
        true = e.patches[t + 1 : t + 1 + HORIZON]
        wrong, still = ((x - true).abs().mean(-1).numpy() for x in (guess, e.patches[t]))  # [H, P] each
        for name, where in shown.items():
            mask = np.stack([where(e, t, h + 1) for h in range(HORIZON)])
            sums[name] += np.stack(((wrong * mask).sum(1), (still * mask).sum(1), mask.sum(1)))
    out = {}
    for name, (wrong, still, count) in sums.items():
        count = np.where(count, count, np.nan)
        out[name] = {"imagined": (wrong / count).tolist(), "copied": (still / count).tolist()}
    return out


def sequences(e: Recorded) -> list[tuple[int, int]]:
    """Where an open hand closes at the object or beside it, and rises by RISE without opening: (start, end) frames."""
    found, t = [], 0
    while t < len(e.actions):
        away = e.tcp[t] - e.place[t]
        near = np.linalg.norm(away[:2]) < BESIDE and away[2] < ABOVE
        if e.actions[t, -1] < -0.5 and e.opening[t] > 0.06 and near:
            for end in range(t + 1, min(t + HORIZON, len(e.actions)) + 1):
                if e.actions[end - 1, -1] > 0.2:
                    break
                if e.tcp[end, 2] - e.tcp[t, 2] >= RISE:
                    found.append((t, end))
                    t = end
                    break
        t += 1
    return found


def grasps(world: LatentModel, episodes: list[Recorded], height) -> dict[str, dict]:
    """Share of sequences in which the imagined object rises with the hand just where the true one does.

    It rises where it goes up by more than half of what the hand does; `height`, of patches [P, D], reads it off (m).
    """
    found = [(i, t, end) for i, e in enumerate(episodes) for t, end in sequences(e)]
    rows = []  # held, imagined as held, seen as held
    for (i, t, end), guess in zip(found, imagine(world, episodes, [(i, t) for i, t, _ in found], HORIZON)):
        e = episodes[i]
        least = (e.tcp[end, 2] - e.tcp[t, 2]) / 2
        before = height(e.patches[t])
        risen = e.place[end, 2] - e.place[t, 2], height(guess[end - t - 1]) - before, height(e.patches[end]) - before
        rows.append([rise > least for rise in risen])
    rows = np.array(rows, bool).reshape(-1, 3)
    out = {}
    for name, some in (("held", rows[rows[:, 0]]), ("missed", rows[~rows[:, 0]]), ("all", rows)):
        if len(some):
            right, seen = some[:, 1] == some[:, 0], some[:, 2] == some[:, 0]
            out[name] = {
                "sequences": len(some), "right": int(right.sum()), "share": float(right.mean()),
                "ci95": list(wilson(int(right.sum()), len(some))), "share_seen": float(seen.mean()),
            }  # fmt: skip
    return out
