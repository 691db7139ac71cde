"""Robot, scenes, tasks and experts in MuJoCo behind the plain Gymnasium interface.

`gym.make("envs:PandaPickPlace-v0", object="cup")`, or `envs.make(EnvConfig(task="pick-place", object="cup"))`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import gymnasium as gym

import envs.gl  # noqa: F401  isort: skip; before anything that imports mujoco

if TYPE_CHECKING:
    from envs.base import EnvConfig, EnvState, PandaEnv
    from envs.foreign import Foreign, adapt
    from envs.tasks import TASKS

__all__ = ["TASKS", "EnvConfig", "EnvState", "Foreign", "PandaEnv", "adapt", "make", "register"]
_HERE = {"base": ("EnvConfig", "EnvState", "PandaEnv"), "tasks": ("TASKS",), "foreign": ("Foreign", "adapt")}
_IDS = {"PandaReach-v0": "reach", "PandaGrasp-v0": "grasp", "PandaReachWithObject-v0": "reach-with-object",
        "PandaPickPlace-v0": "pick-place", "PandaPickPlaceFragile-v0": "pick-place-fragile"}  # fmt: skip


def __getattr__(name: str):
    """What is imported when it is first asked for: MuJoCo takes long."""
    for module, names in _HERE.items():
        if name in names:
            value = getattr(importlib.import_module(f"envs.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'envs' has no attribute {name!r}")


def make(config: EnvConfig, render_mode: str | None = None) -> PandaEnv:
    """Return the environment of a config."""
    from envs.base import PandaEnv

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
    from envs.base import EnvConfig, PandaEnv

    config = EnvConfig(task, object, image_size, cameras, action_dim, max_steps, randomization, render_goals, stop_on_success)
    return PandaEnv(config, render_mode)


def register() -> None:
    """Tell Gymnasium the ids, as importing this package does. Calling it again changes nothing."""
    for name, task in _IDS.items():
        if name not in gym.registry:
            gym.register(name, entry_point="envs:_make_registered", kwargs={"task": task})


register()
