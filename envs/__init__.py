"""Robot, scenes, tasks and experts in MuJoCo behind the plain Gymnasium interface.

`gym.make("envs:PandaPickPlace-v0", object="cup")`, or `envs.make(EnvConfig(task="pick-place", object="cup"))`.
"""

from __future__ import annotations

import gymnasium as gym

import envs.gl  # noqa: F401  isort: skip; before anything that imports mujoco
from envs.adapt import Foreign, adapt
from envs.base import EnvConfig, EnvState, PandaEnv
from envs.tasks import TASKS

__all__ = ["TASKS", "EnvConfig", "EnvState", "Foreign", "PandaEnv", "adapt", "make", "register"]
_IDS = {"PandaReach-v0": "reach", "PandaGrasp-v0": "grasp", "PandaReachWithObject-v0": "reach-with-object",
        "PandaPickPlace-v0": "pick-place"}  # fmt: skip


def make(config: EnvConfig, render_mode: str | None = None) -> PandaEnv:
    """Return the environment of a config."""
    return PandaEnv(config, render_mode)


def _make_registered(
    task: str,
    object: str = "box",
    image_size: int = 96,
    cameras: tuple[str, ...] = ("front",),
    action_dim: int = 4,
    max_steps: int = 40,
    randomization: str = "none",
    render_goals: bool = True,
    stop_on_success: bool = True,
    render_mode: str | None = None,
) -> PandaEnv:
    config = EnvConfig(task, object, image_size, cameras, action_dim, max_steps, randomization, render_goals, stop_on_success)
    return PandaEnv(config, render_mode)


def register() -> None:
    """Tell Gymnasium the four ids; also the target of the entry point `gymnasium.envs`. Calling it again changes nothing."""
    for name, task in _IDS.items():
        if name not in gym.registry:
            gym.register(name, entry_point="envs:_make_registered", kwargs={"task": task})


register()
