"""Train the action-conditioned predictor on a frozen encoder's features.

The features of all frames are computed once and kept in --cache. Writes RUN/model.safetensors (encoder and predictor
in one file, what --model takes) at the end, and on the way checkpoints, metrics.jsonl and TensorBoard curves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """What to train on, how long, and where to; every other field is part of the recipe."""

    data: tuple[Path, ...]
    """one or more folders that `worldmodel collect` made; the last 3 % of each one's episodes are held out. Of several
    cameras, the first ones count, as many as the encoder sees"""
    encoder: Path
    """encoder.safetensors that `worldmodel pretrain` wrote, or a model.safetensors, whose encoder is meant, or
    efficientnet-lite0, ImageNet's features"""
    out: Path
    """folder of the run; new or empty, unless --resume"""
    cache: Path | None = None
    """folder for features, about 25 kB per frame (None: features/ in the first data folder)"""
    minutes: float | None = None
    """stop after so many minutes, with a checkpoint that --resume goes on from; the schedule stays that of --steps
    (None: train to the end)"""
    resume: bool = False
    """go on with the run in --out from its last checkpoint, with the same recipe"""
    threads: int = 2
    """processor threads; the number is part of what makes two runs bit-equal"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it trains: cpu, cuda"""
    start: str = ""
    """path of a model.safetensors whose predictor to start from, of the same encoder and sizes (z begins anew where it is
    of another kind, or with --free-share), and whose policy to keep; empty: random weights"""
    merge: int = 2
    """a token of the predictor holds merge x merge patches; more is faster and coarser"""
    embed_dim: int = 256
    """width of the predictor"""
    depth: int = 4
    """transformer blocks of the predictor"""
    num_heads: int = 4
    """attention heads of the predictor; divides --embed-dim"""
    latent_dim: int = 8
    """numbers in z, the stochastic part of a transition"""
    codes: bool = False
    """z is one of --latent-dim codes instead of --latent-dim normal numbers"""
    window: int = 3
    """frames that the predictor sees, the present one included"""
    hidden: int = 0
    """units of a layer between a token's features and the predictor's width, and back (0: linear maps)"""
    gated: bool = False
    """the predictor tells how much of each patch stays, beside what comes: without it, what goes has to be told number by number"""
    pooled: bool = False
    """attention pools what z's posterior sees of an outcome, so that it is known wherever on the table it happens"""
    forks: tuple[Path, ...] = ()
    """folders that `worldmodel collect --forks` made: ends of steps that branch, of which z learns to tell"""
    fork_share: float = 0.25
    """share of the clips that are of --forks; their z is never the prior's mean"""
    fork_weight: float = 8.0
    """how much more than others a patch counts in which the ends of such a step lie apart as they do in the mean"""
    transitions: int = 4
    """actions in a training clip (steps of 0.2 s)"""
    rollout: int = 2
    """steps of imagination in the loss, at most --transitions; 1 is teacher forcing alone"""
    proprio_weight: float = 0.1
    """of the error of proprioception, in the data's deviations, beside that of the features"""
    proprio_beta: float = 0.3
    """errors of proprioception below it, in those deviations, count by their square; 0: none do"""
    free_nats: float = 0.5
    """information of z per transition that costs nothing (nats)"""
    information_weight: float = 1e-3
    """of the information of z beyond that"""
    free_share: float = 0.0
    """share of the steps, up to a half, in which no information costs anything, so that z is tried at all; over as many more its
    weight rises"""
    spread_weight: float = 0.0
    """of how much a sample of z changes what is imagined, in the clips of --prior-share: where no step branches z is to be silent"""
    prior_share: float = 0.25
    """share of the clips whose z is the prior's mean, as in planning; for the others it has seen the outcome"""
    batch: int = 32
    """clips per step"""
    steps: int = 4000
    """training steps in all; warm-up and cool-down of the learning rate are shares of them"""
    rate: float = 6e-4
    """highest learning rate (AdamW)"""
    latent_rate: float = 1.0
    """learning rate of what makes z and what hears it, in units of --rate: z has to be worth listening to before the rest has learned not to"""
    seed: int = 0
    """seed of weights, clips and z"""

    def __post_init__(self):
        for name in ("threads", "merge", "embed_dim", "depth", "num_heads", "latent_dim", "window", "transitions", "rollout", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, expected more than 0")


def run(config: Config) -> dict:
    """Train, and return where the model is and its open-loop error beside that of copying the last frame."""
    import torch

    from worldmodel.checkpoint import read_header
    from worldmodel.commands.cli import shared
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.hub import load_encoder
    from worldmodel.train import TrainConfig, train

    torch.set_num_threads(config.threads)
    recipe = TrainConfig(**shared(config, TrainConfig))
    encoder = load_encoder(config.encoder)
    cache = config.cache or config.data[0] / "features"
    forks = Dataset.open(config.forks) if config.forks else None
    path = train(recipe, encoder, Dataset.open(config.data), config.out, cache, config.minutes, config.resume, usable(config.device), forks)
    if path is None:
        return {"finished": False, "run": str(config.out)}
    _, _, about = read_header(path, "model")
    return {"finished": True, "model": str(path), "minutes": about["minutes"], **about["held_out"]}


def report(result: dict) -> str:
    """The result as a table: L1 of features by horizon."""
    if not result["finished"]:
        return f"{result['run']}: stopped before the end of the schedule; the same command with --resume goes on"
    lines = [f"{result['model']}: {result['minutes']} minutes", "horizon  open loop  copying the last frame"]
    for key, value in result.items():
        if key.startswith("open_loop/"):
            h = key.split("/")[1]
            lines.append(f"{h:>7}  {value:9.4f}  {result[f'copy/{h}']:22.4f}")
    if "hazard_auroc" not in result:
        lines.append("no hazard head: not all episodes say what was unsafe")
    elif math.isfinite(result["hazard_auroc"]):
        lines.append(f"hazard head: area under the ROC curve {result['hazard_auroc']:.3f}")
    else:
        lines.append("hazard head: nothing was unsafe, or everything, so what it is worth is not known")
    return "\n".join(lines)
