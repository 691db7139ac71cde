"""Learn from demonstrations: sub-goals, which let a model plan from a goal picture alone, and the way that hands take.

Of episodes that are marked as successes, the proposer learns which pictures lie between a start and an end: that at which
the gripper has closed, and that at which it is about to open. The way is what hands did on theirs from one to the next.
Writes RUN/model.safetensors, the given model with both in it, and on the way checkpoints, metrics.jsonl and TensorBoard curves.
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
    way_data: tuple[Path, ...] = ()
    """folders that the way learns from, such as of tasks that need another one (none: those in --data)"""
    model: Path | None = None
    """model.safetensors that gets the proposer and the way (None: the shipped model)"""
    cache: Path | None = None
    """folder for features, shared with `worldmodel train` (None: features/ in the first data folder)"""
    minutes: float | None = None
    """stop the proposer's training after so many minutes, with a checkpoint that --resume goes on from (None: train to the end)"""
    resume: bool = False
    """go on with the run in --out from its last checkpoint, with the same recipe"""
    threads: int = 2
    """processor threads; the number is part of what makes two runs bit-equal"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the proposer trains: cpu, cuda"""
    merge: int = 2
    """a token holds merge x merge patches"""
    embed_dim: int = 192
    """width of the proposer"""
    depth: int = 4
    """transformer blocks"""
    num_heads: int = 3
    """attention heads; divides --embed-dim"""
    batch: int = 64
    """pairs of a frame and a goal per step"""
    draws: int = 8
    """pairs of each grasp, which it learns from where the hand will close and open"""
    epochs: int = 20
    """passes over them"""
    steps: int = 2000
    """training steps in all"""
    rate: float = 8e-4
    """highest learning rate (AdamW)"""
    way_steps: int = 4000
    """training steps of the way, after the proposer's"""
    way_rate: float = 2e-3
    """its highest learning rate"""
    seed: int = 0
    """seed of weights and pairs"""

    def __post_init__(self):
        for name in ("threads", "merge", "embed_dim", "depth", "num_heads", "batch", "draws", "epochs", "steps", "way_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, expected more than 0")


def run(config: Config) -> dict:
    """Train, and return where the model is and how far its proposals are from held-out keyframes."""
    import torch

    from worldmodel import model
    from worldmodel.commands.cli import shared
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.guide import fit_guide
    from worldmodel.propose import ProposalConfig, fit_proposals

    torch.set_num_threads(config.threads)
    world = model.load(config.model)
    recipe, cache = ProposalConfig(**shared(config, ProposalConfig)), config.cache or config.data[0] / "features"
    data = Dataset.open(config.data)
    frames, known = data.load(keys=("proprio", "actions")), world.predictor.config
    for name, have, want in (("proprio", frames.proprio, known.proprio_dim), ("actions", frames.actions, known.action_dim)):
        if have.shape[1] != want:
            raise ValueError(f"{name} of the data have {have.shape[1]} numbers, the model's have {want}; give data of the model's robot")
    others = Dataset.open(config.way_data) if config.way_data else None
    device = usable(config.device)
    made = fit_proposals(recipe, world.encoder, data, config.out, cache, config.minutes, config.resume, others, device)
    if made is None:
        return {"finished": False, "run": str(config.out)}
    world.proposer, way, about = made
    if world.guide is None:
        world.guide = fit_guide(frames)
    world.guide.way = way
    world.about["proposer"] = about
    path = config.out / "model.safetensors"
    world.save(path)
    return {"finished": True, "model": str(path), **{k: v for k, v in about.items() if k != "recipe"}}


def report(result: dict) -> str:
    """The same for people."""
    if not result["finished"]:
        return f"{result['run']}: stopped before the end of the schedule; the same command with --resume goes on"
    places = [1000 * result[f"held_out/place_{name}"] for name in ("closed", "opens")]
    return (
        f"{result['model']}: {result['minutes']} minutes on {result['episodes']} grasps; held out, the proposed hand is "
        f"{places[0]:.0f} mm from where it closed and {places[1]:.0f} mm from where it opened (medians), and the way's actions are {result['held_out/way']:.3f} off (L1)"
    )
