"""Energies: how far imagined features are from a goal's.

L1 between imagined and goal features is V-JEPA 2-AC's energy (arXiv 2506.09985, section 3.2); summing it over the horizon is
better where plans are longer than what is run of them (EB-JEPA): the last frame alone leaves the first action free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.interface import Features


@dataclass(frozen=True)
class EnergyConfig:
    """What an energy measures. Raises ValueError for values that make no sense."""

    distance: Literal["l1", "l2", "cosine"] = "l1"  # of features, meaned over patches (and entries)
    horizon: Literal["last", "sum"] = "sum"  # the last imagined frame, or a weighted mean over all of them
    discount: float = 0.7  # for "sum": each frame weighs this much of the one after it
    proprio_weight: float = 1.0  # of the scaled L1 distance of proprioception, where the goal has any
    proprio_scale: tuple[float, ...] = ()  # what counts as 1, in the units of each entry; () is 1 for all
    effort_weight: float = 0.0  # of the mean square of the actions

    def __post_init__(self) -> None:
        for name, known in (("distance", ("l1", "l2", "cosine")), ("horizon", ("last", "sum"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount is {self.discount}: expected more than 0, and at most 1")
        if min(self.proprio_weight, self.effort_weight) < 0 or min(self.proprio_scale, default=1.0) <= 0:
            raise ValueError("expected weights of at least 0 and scales of more than 0")


@dataclass(frozen=True)
class GoalEnergy:
    """Distance to a goal: patches [P, D], or [B, P, D] for B problems; proprio [S] or [B, S], where it is known."""

    goal: Features
    config: EnergyConfig = EnergyConfig()
    patch_weights: Tensor | None = None  # [P] or [B, P], mean 1: how much each patch counts

    def __call__(self, imagined: Features, actions: Tensor) -> Tensor:
        """patches [B, N, K, H, P, D], actions [B, N, H, A] -> [B, N, K]. Raises ValueError for shapes that do not fit."""
        self._check(imagined, actions)
        patches = imagined.patches if self.config.horizon == "sum" else imagined.patches[:, :, :, -1:]
        energy = self._distance(patches, _spread(self.goal.patches, 2))  # [B, N, K, H or 1, P]
        if self.patch_weights is not None:
            energy = energy * _spread(self.patch_weights, 1)
        energy = energy.mean(-1)
        if self.goal.proprio is not None and self.config.proprio_weight:
            proprio = imagined.proprio[:, :, :, -energy.shape[-1] :]
            energy = energy + self.config.proprio_weight * self._proprio(proprio)
        steps = torch.arange(energy.shape[-1] - 1, -1, -1, dtype=energy.dtype, device=energy.device)
        weights = self.config.discount**steps
        energy = (energy * weights).sum(-1) / weights.sum()  # [B, N, K]
        if self.config.effort_weight:
            energy = energy + self.config.effort_weight * actions.square().mean((-2, -1))[:, :, None]
        return energy

    def _distance(self, patches: Tensor, goal: Tensor) -> Tensor:
        if self.config.distance == "l1":
            return (patches - goal).abs().mean(-1)
        if self.config.distance == "l2":
            return (patches - goal).square().mean(-1)
        return 1 - F.cosine_similarity(patches, goal, dim=-1)

    def _proprio(self, proprio: Tensor) -> Tensor:
        """proprio [B, N, K, H, S] -> [B, N, K, H]."""
        difference = (proprio - _spread(self.goal.proprio, 1)).abs()
        if self.config.proprio_scale:
            difference = difference / torch.tensor(self.config.proprio_scale).to(difference)
        return difference.mean(-1)

    def _check(self, imagined: Features, actions: Tensor) -> None:
        patches, goal = imagined.patches, self.goal
        if patches.dim() != 6 or goal.patches.dim() not in (2, 3) or patches.shape[-2:] != goal.patches.shape[-2:]:
            raise ValueError(
                f"expected imagined patches [B, N, K, H, P, D] and a goal [P, D] or [B, P, D] of the same P and D, got "
                f"{list(patches.shape)} and {list(goal.patches.shape)}; encode the goal with the model that imagines"
            )
        if goal.patches.dim() == 3 and len(goal.patches) not in (1, len(patches)):
            raise ValueError(f"{len(goal.patches)} goals for {len(patches)} problems; expected one for each, or one for all")
        b, n, _, horizon = patches.shape[:4]
        if actions.dim() != 4 or actions.shape[:3] != (b, n, horizon):
            raise ValueError(f"expected actions [{b}, {n}, {horizon}, A] for these features, got {list(actions.shape)}")
        if goal.proprio is None or not self.config.proprio_weight:
            return
        size = goal.proprio.shape[-1]
        if imagined.proprio is None or imagined.proprio.shape != (*patches.shape[:4], size):
            found = "none" if imagined.proprio is None else list(imagined.proprio.shape)
            raise ValueError(
                f"the goal has proprioception [{size}], the imagined features have {found}; give the goal as pixels alone "
                "or set proprio_weight to 0"
            )
        if len(self.config.proprio_scale) not in (0, size):
            raise ValueError(f"proprio_scale has {len(self.config.proprio_scale)} entries, expected {size}")


def _spread(goal: Tensor, own: int) -> Tensor:
    """[..., own axes] for one or B problems -> the same with axes for N, K and H in between."""
    batch = goal if goal.dim() == own + 1 else goal[None]
    return batch[:, None, None, None]
