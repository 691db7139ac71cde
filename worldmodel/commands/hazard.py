"""Train a hazard head for a model: how likely a step is to go wrong, for what a planner weighs and a gate refuses.

`worldmodel train` makes one from all of its data. One that knows the steps of those who will ask it tells them better:
`worldmodel bench --policy imitation --record` keeps a policy's own, with what went wrong. It sees as the model's policy does, and
learns to look where there is none. Writes OUT/model.safetensors, the given model with this head; all else stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Config:
    """What to train on, how long, and where to."""

    data: tuple[Path, ...]
    """one or more folders of episodes with what was unsafe; the last 3 % of each one's are held out"""
    out: Path
    """folder of the result; new or empty"""
    model: Path | None = None
    """model.safetensors which gets the head (None: the shipped model)"""
    cache: Path | None = None
    """folder for features, shared with `worldmodel train` (None: features/ in the first data folder)"""
    threads: int = 2
    """processor threads; the number is part of what makes two runs bit-equal"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it trains: cpu, cuda"""
    epochs: int = 25
    """passes over the steps of the data"""
    seed: int = 0
    """seed of weights and order"""

    def __post_init__(self):
        for name in ("threads", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")


def run(config: Config) -> dict:
    """Train, and return where the model is and what the head is worth on held-out episodes."""
    import torch

    from worldmodel import files, model
    from worldmodel.data import Dataset
    from worldmodel.encoder import usable
    from worldmodel.hazard import LABEL
    from worldmodel.imitation import check_robot
    from worldmodel.train import has, identify, learn_hazard, placed_features

    torch.set_num_threads(config.threads)
    world, data, device = model.load(config.model), Dataset.open(config.data), usable(config.device)
    if not has(data, LABEL):
        raise ValueError(f"not all episodes of {', '.join(map(str, config.data))} say what was unsafe: expected {LABEL} in each")
    parts = dict(zip(("train", "held"), data.split(0.03)))
    frames = {name: part.load(keys=("proprio", "actions")) for name, part in parts.items()}
    check_robot(frames["train"], world)
    cache = config.cache or config.data[0] / "features"
    with files.fresh(config.out, "hazard") as folder:
        features = dict(zip(parts, placed_features(world.encoder, list(parts.values()), cache, device)))
        world.predictor.to(device)
        look = None if world.policy is None else world.policy.look
        world.hazard, scores = learn_hazard(world.predictor, features, parts, frames, config.seed, config.epochs, look)
        world.predictor.cpu()
        recipe = {"data": data.fingerprint, "encoder": identify(world.encoder), "epochs": config.epochs, "seed": config.seed}
        earlier = world.about.get("held_out", {})  # with the scores of the head that this one replaces
        world.about |= {"held_out": {k: v for k, v in earlier.items() if not k.startswith("hazard_")}, "hazard": {"recipe": recipe, "held_out": scores}}
        path = folder / "model.safetensors"
        world.save(path)
    return {"model": str(path), **scores}


def report(result: dict) -> str:
    """The same for people."""
    return (
        f"{result['model']}: area under the ROC curve {result['hazard_auroc']:.3f}, expected calibration error {result['hazard_ece']:.3f}, on "
        f"imagined steps of held-out episodes, of which {result['hazard_rate']:.1%} went wrong"
    )
