"""How unlike what was seen before a picture's features are: what a sampled z cannot tell, because it was never trained on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodel.checkpoint import load_tensors, sha256_of

WORST = 4  # patches that count: a strange thing is small


@dataclass(frozen=True)
class Density:
    """Independent normals for every entry of every patch, at its place: the camera does not move."""

    mean: Tensor  # float32 [P, D]
    std: Tensor  # float32 [P, D]

    @classmethod
    def fit(cls, patches: Tensor) -> Density:
        """Of features [M, P, D] that are as they should be."""
        return cls(patches.mean(0), patches.std(0).clamp_min(0.05))

    def __call__(self, patches: Tensor) -> Tensor:
        """Mean squared deviation [...] of the worst patches of features [..., P, D], in the data's own; 1 is usual.

        Raises ValueError for features of another size.
        """
        if patches.shape[-2:] != self.mean.shape:
            own, came = list(self.mean.shape), list(patches.shape[-2:])
            raise ValueError(f"expected features of {own}, as of the pictures that it was fit to, got {came}; fit or calibrate it with this model")
        off = ((patches - self.mean.to(patches)) / self.std.to(patches)).square().mean(-1)
        return off.topk(min(WORST, off.shape[-1]), -1)[0].mean(-1)


class Calibration(NamedTuple):
    """What `worldmodel calibrate` found out."""

    limits: dict[str, float]  # of each signal of a gate; infinite: any value
    usual: Density  # of the pictures' features
    of: dict  # the model, task and planner that it holds for


def load_calibration(path: str | Path, weights: str | Path | None = None) -> Calibration:
    """A calibration from a file. Raises ValueError where it is of other weights than those of a model's file."""
    tensors, found, _ = load_tensors(path, "calibration")
    if weights is not None and found["of"].get("model_sha256") != sha256_of(Path(weights)):
        raise ValueError(f"{path} was calibrated for other weights than {weights}; calibrate with these: `worldmodel calibrate --model {weights}`")
    limits = {name: math.inf if value is None else value for name, value in found["limits"].items()}
    return Calibration(limits, Density(tensors["mean"], tensors["std"]), found["of"])
