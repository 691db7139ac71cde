"""Benchmarks of others that are known by name: what their goals are, and who plays in them.

FetchPickAndPlace-v4 of Gymnasium-Robotics (extra peers): a Fetch arm whose hand hangs on a moving point, a block of 5 cm, and
a goal for it, half of the time in the air. Its own success counts: the block within 5 cm of the goal. A goal is a picture with
the block there, held, and the first of two sub-goals one with the block held where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

Obs = Mapping[str, np.ndarray]
Policy = Callable[[Mapping[str, Any]], np.ndarray]

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_BLOCK = 0.025  # m, half the edge of Fetch's block
_REACH = 0.05  # m per unit of Fetch's action and step
_OPEN = 0.05  # m, of each of Fetch's fingers
_TRIES = 100  # draws of a start and a goal that are far enough apart


class Fetch(gym.Wrapper):
    """FetchPickAndPlace whose gripper keeps to what it was last told, with pictures of goals and without the goal's mark.

    Starts are at least `least` m from their goals. What experts read is in info as privileged/*.
    """

    def __init__(self, env: gym.Env, least: float = 0.1) -> None:
        super().__init__(env)
        self._own, self._least, self._told = env.unwrapped, least, 1.0
        model = self._own.model
        model.site_rgba[:, 3] = 0.0  # the mark
        model.geom_rgba[model.geom_bodyid == model.body("robot0:mocap").id, 3] = 0.0  # axes of the point
        self._block = int(model.joint("object0:joint").qposadr[0])
        self._fingers = [int(model.joint(f"robot0:{side}_gripper_finger_joint").qposadr[0]) for side in "lr"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode. Raises ValueError where no goal is far enough."""
        self._told = 1.0
        for _ in range(_TRIES):
            obs, info = self.env.reset(seed=seed, options=options)
            seed = None  # the next draw goes on from this one
            if np.linalg.norm(obs["desired_goal"] - obs["achieved_goal"]) >= self._least:
                return obs, info | self._privileged(obs)
        raise ValueError(f"no goal of {_TRIES} is {self._least} m from its start; give a smaller least")

    def step(self, action: np.ndarray):
        """Run an action; one whose last number is within 0.5 of 0 leaves the gripper as it was told to be."""
        if abs(action[-1]) > 0.5:
            self._told = float(np.sign(action[-1]))
        obs, reward, terminated, truncated, info = self.env.step(np.append(action[:-1], self._told).astype(np.float32))
        return obs, reward, terminated, truncated, info | self._privileged(obs)

    def goals(self, obs: Mapping[str, np.ndarray]) -> list[Obs]:
        """The block held where it lies, and where it is to be; the present state stays exactly as it was."""
        return [self._held_at(obs["achieved_goal"]), self._held_at(obs["desired_goal"])]

    def _privileged(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "privileged/hand": obs["observation"][:3], "privileged/object_pos": obs["achieved_goal"],
            "privileged/target_pos": obs["desired_goal"], "privileged/opening": obs["observation"][9:11].sum(),
        }  # fmt: skip

    def _held_at(self, place: np.ndarray) -> Obs:
        """A picture of the block in the closed hand at a place [3], and the proprioception there."""
        own, model, data = self._own, self._own.model, self._own.data
        before = np.empty(mujoco.mj_stateSize(model, _STATE))
        mujoco.mj_getState(model, data, before, _STATE)
        block = slice(self._block, self._block + 7)
        data.qpos[block] = [0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0]  # out of the way
        own._utils.reset_mocap2body_xpos(model, data)
        data.mocap_pos[0] += place - data.site("robot0:grip").xpos
        for _ in range(30):  # which the hand follows
            data.qpos[block][:3] = [0.0, 0.0, -1.0]
            mujoco.mj_step(model, data, own.n_substeps)
        data.qpos[block] = [*place, 1.0, 0.0, 0.0, 0.0]
        data.qpos[self._fingers] = _BLOCK
        data.qvel[:] = 0.0
        mujoco.mj_forward(model, data)
        seen = {"pixels": self.env.render(), "proprio": fetch_proprio(own._get_obs())}
        mujoco.mj_setState(model, data, before, _STATE)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, before, _STATE)  # mj_forward has touched the warm start
        return seen


def fetch_proprio(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Place of the hand (m), and opening of the gripper (m): [4]."""
    seen = obs["observation"]
    return np.append(seen[:3], seen[9:11].sum())


class FetchExpert:
    """From above onto the block, close, to the goal, and stay; `noise`, `offset` and `drop` spoil it."""

    def __init__(self, skip: int, rng: np.random.Generator, noise: float = 0.0, offset: float = 0.0, drop: bool = False) -> None:
        self._rng, self._noise, self._step = rng, noise, _REACH * skip
        self._offset = rng.normal(0.0, offset, 3) * [1, 1, 0] if offset else np.zeros(3)
        self._drops_after = int(rng.integers(1, 6)) if drop else None
        self._closing = self._carried = 0
        self._down = False

    def __call__(self, info: Mapping[str, Any]) -> np.ndarray:
        """An action [4]."""
        hand, block = info["privileged/hand"], info["privileged/object_pos"] + self._offset
        aside, above = np.linalg.norm((hand - block)[:2]), hand[2] - block[2]
        grip = 1.0
        if self._closing:
            grip, self._closing = -1.0, self._closing + 1
            goal = hand
            if self._closing > 3:
                goal, self._carried = info["privileged/target_pos"], self._carried + 1
            if self._drops_after is not None and self._carried > self._drops_after:
                grip = 1.0
            if self._carried > 2 and np.linalg.norm(hand - block) > 0.06 and self._drops_after is None:  # lost
                self._closing, self._carried, self._down = 0, 0, False
        elif self._down or aside < 0.012:
            self._down, goal = True, block
            if above < 0.012:
                self._closing, grip = 1, -1.0
        else:
            goal = block + [0.0, 0.0, 0.08]
        motion = (goal - hand) / self._step + self._noise * self._rng.normal(size=3)
        return np.append(motion.clip(-1, 1), grip).astype(np.float32)


def fetch_player(name: str, skip: int, rng: np.random.Generator) -> Policy:
    """The expert, or a mixture that is drawn anew for each episode: experts that are noisy, miss, or drop."""
    if name == "mixture":
        kinds = {"noise": float(rng.uniform(0.1, 0.5))}, {"noise": 0.2, "offset": 0.03}, {"noise": 0.2, "drop": True}
        return FetchExpert(skip, rng, **kinds[rng.choice(3, p=[0.6, 0.25, 0.15])])
    return FetchExpert(skip, rng)


@dataclass(frozen=True)
class Ready:
    """How an environment of others becomes like ours, by its id."""

    module: str  # that registers it
    kwargs: dict[str, Any]  # for gym.make, unless others are given
    wrap: Callable[[gym.Env, float], gym.Env]  # of the environment, and the least distance of goals
    proprio: Callable[[Any], np.ndarray]
    player: Callable[[str, int, np.random.Generator], Policy]  # expert or mixture, for a frame skip


READY: dict[str, Ready] = {
    "FetchPickAndPlace-v4": Ready(
        "gymnasium_robotics",
        {"width": 192, "height": 192, "default_camera_config": {
            "distance": 1.1, "azimuth": 155.0, "elevation": -22.0, "lookat": np.array([1.36, 0.75, 0.6])}},
        lambda env, least: Fetch(env, least or 0.1), fetch_proprio, fetch_player,
    ),
}  # fmt: skip
