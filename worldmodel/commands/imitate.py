"""Train a goal-conditioned policy on a frozen encoder's features, to compare the planner with.

With --reach 30 it is behaviour cloning in hindsight, with --reach 3 an inverse dynamics model. Writes
RUN/policy.safetensors, what `worldmodel bench --policy imitation` takes as --model.
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
    encoder: Path
    """encoder.safetensors, or a model.safetensors, whose encoder is meant, or efficientnet-lite0"""
    out: Path
    """folder of the run; new or empty, unless --resume"""
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

    from worldmodel.checkpoint import load_tensors
    from worldmodel.commands.cli import shared
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.imitation import ImitationConfig, imitate
    from worldmodel.hub import load_encoder

    torch.set_num_threads(config.threads)
    recipe = ImitationConfig(**shared(config, ImitationConfig))
    cache = config.cache or config.data[0] / "features"
    encoder = load_encoder(config.encoder)
    path = imitate(recipe, encoder, Dataset.open(config.data), config.out, cache, config.minutes, config.resume, usable(config.device))
    if path is None:
        return {"finished": False, "run": str(config.out)}
    _, _, about = load_tensors(path, "policy")
    return {"finished": True, "policy": str(path), "minutes": about["minutes"], "held_out": about["held_out"]}


def report(result: dict) -> str:
    """The same for people."""
    if not result["finished"]:
        return f"{result['run']}: stopped before the end of the schedule; the same command with --resume goes on"
    return f"{result['policy']}: {result['minutes']} minutes, loss {result['held_out']:.3f} on held-out episodes"
