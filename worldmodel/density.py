"""How unlike what was seen before a picture's features are: what a sampled z cannot tell, because it was never trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        """Mean squared deviation [...] of the worst patches of features [..., P, D], in the data's own; 1 is usual."""
        off = ((patches - self.mean.to(patches)) / self.std.to(patches)).square().mean(-1)
        return off.topk(min(WORST, off.shape[-1]), -1)[0].mean(-1)
