"""The only loop over a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

Act = Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], np.ndarray]


@dataclass(frozen=True)
class Record:
    """One episode of T actions: T + 1 observations and infos, the first ones from reset."""

    seed: int
    obs: dict[str, np.ndarray]  # pixels uint8 [T + 1, h, w, 3], proprio float32 [T + 1, 7]
    actions: np.ndarray  # float32 [T, A]
    infos: list[dict[str, Any]]  # T + 1, without goal and subgoals
    goal: dict[str, np.ndarray]  # empty where the environment has none
    subgoals: list[dict[str, np.ndarray]]
    success: bool  # at any step

    def privileged(self, name: str) -> np.ndarray:
        """Stack `privileged/<name>` over time: [T + 1, ...]."""
        return np.stack([np.asarray(info[f"privileged/{name}"]) for info in self.infos])


def rollout(env: gym.Env, act: Act, seed: int, max_steps: int | None = None) -> Record:
    """Run one episode from `reset(seed)` until it ends, or for `max_steps`.

    `act(obs, info) -> action [A]`. A policy of `envs.experts` reads info alone: `lambda obs, info: policy(info)`.
    """
    obs, info = env.reset(seed=seed)
    goal, subgoals = info.get("goal", {}), info.get("subgoals", [])
    observations, actions, infos = [obs], [], [slim(info)]
    while max_steps is None or len(actions) < max_steps:
        action = np.asarray(act(obs, info), np.float32)
        obs, _, terminated, truncated, info = env.step(action)
        actions.append(action)
        observations.append(obs)
        infos.append(slim(info))
        if terminated or truncated:
            break
    stacked = {key: np.stack([o[key] for o in observations]) for key in observations[0]}
    success = any(i["success"] for i in infos)
    return Record(seed, stacked, np.stack(actions), infos, goal, subgoals, success)


def slim(info: Mapping[str, Any]) -> dict[str, Any]:
    """An info without the goal and the sub-goals, pictures that are the same all through an episode."""
    return {key: value for key, value in info.items() if key not in ("goal", "subgoals")}
