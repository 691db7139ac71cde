"""Train a policy that sees a goal picture, on a model's frozen features: where the search for a plan begins.

With --reach 30 it is behaviour cloning in hindsight, with --reach 3 an inverse dynamics model. Writes RUN/model.safetensors, the
given model with it: what `worldmodel bench` plans with, or with --policy imitation lets act alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """What to train on, how long, and where to; every other field is part of the recipe."""

    data: tuple[Path, ...]
    """one or more folders that `worldmodel collect` made; the last 3 % of each one's episodes are held out"""
    out: Path
    """folder of the run; new or empty, unless --resume"""
    model: Path | None = None
    """model.safetensors that gets the policy (None: the shipped model)"""
    careful: bool = False
    """it is the policy that an agent goes by once a plan came near its gate's limit; the one that the search begins with stays as it is"""
    cache: Path | None = None
    """folder for features, shared with `worldmodel train` (None: features/ in the first data folder)"""
    minutes: float | None = None
    """stop after so many minutes, with a checkpoint that --resume goes on from (None: train to the end)"""
    resume: bool = False
    """go on with the run in --out from its last checkpoint, with the same recipe"""
    threads: int = 2
    """processor threads; the number is part of what makes two runs bit-equal"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it trains: cpu, cuda"""
    reach: int = 30
    """goals are 1 to so many steps ahead of an action, in the same episode"""
    ends: float = 0.0
    """share of the goals that are the last frame of the episode, however far ahead: where goal pictures are of what is done, with the
    arm out of the way (0 to 1)"""
    strangers: float = 0.0
    """share of the goals, for steps before the gripper first closes, that are what other episodes came to: the way to an object is that to
    any goal of it, where the data is of hands that fetch what lies somewhere else each time (0 to 1)"""
    log_above: float = 0.0
    """motion above which the loss counts it by its logarithm, in units of an action: for the last centimetre, where an action of 1 goes far,
    0.1 (0: all counts alike)"""
    width: int = 256
    """numbers that are pooled from a picture, and half the width of what follows"""
    batch: int = 256
    """actions per step"""
    steps: int = 4000
    """training steps in all"""
    rate: float = 1e-3
    """highest learning rate (AdamW)"""
    seed: int = 0
    """seed of weights and clips"""

    def __post_init__(self):
        for name in ("threads", "reach", "width", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, expected more than 0")


def run(config: Config) -> dict:
    """Train, and return where the policy is."""
    import torch

    from worldmodel import model
    from worldmodel.commands.cli import shared
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.imitation import ImitationConfig, fit_policy

    torch.set_num_threads(config.threads)
    world = model.load(config.model)
    recipe, cache = ImitationConfig(**shared(config, ImitationConfig)), config.cache or config.data[0] / "features"
    data, device = Dataset.open(config.data), usable(config.device)
    made = fit_policy(recipe, world, data, config.out, cache, config.minutes, config.resume, device)
    if made is None:
        return {"finished": False, "run": str(config.out)}
    policy, about = made
    policy.to(next(world.predictor.parameters()).dtype)  # a model in half precision stays so
    part = "careful" if config.careful else "policy"
    setattr(world, part, policy)
    world.about[part] = about
    path = config.out / "model.safetensors"
    world.save(path)
    return {"finished": True, "model": str(path), "minutes": about["minutes"], "held_out": about["held_out"]}


def report(result: dict) -> str:
    """The same for people."""
    if not result["finished"]:
        return f"{result['run']}: stopped before the end of the schedule; the same command with --resume goes on"
    return f"{result['model']}: {result['minutes']} minutes, loss {result['held_out']:.3f} on held-out episodes"
