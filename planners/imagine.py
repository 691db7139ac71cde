"""Imagination as a cost: what a planner minimises, made of a world model, an energy and a hazard."""

from __future__ import annotations

import torch
from torch import Tensor

from planners.interface import Cost
from worldmodel.interface import Context, Energy, Features, Hazard, WorldModel


def imagine(
    model: WorldModel,
    context: Context,
    energy: Energy,
    horizon: int,
    generator: torch.Generator | None = None,
    samples_z: int = 0,
    chunk: int = 512,
    hazard: Hazard | None = None,
    risk_weight: float = 0.0,
) -> Cost:
    """The cost of plans of `horizon` steps: the mean energy of the futures that the model imagines.

    With a hazard, plus risk_weight times how likely the worst step is to go wrong, meaned over the worse half of the
    futures (conditional value at risk).

    The same z are used for all candidates, so that they differ by their actions alone; they are drawn now, `samples_z` for
    each problem, or with 0 are the prior's mean. At most about `chunk` futures are held at once.
    """
    b = len(context.features.patches)
    z = model.sample_z((b, 1, max(1, samples_z), horizon), generator if samples_z else None)

    def value(actions: Tensor) -> Tensor:
        imagined, energies = look_ahead(model, context, energy, actions, z)
        if hazard is None or not risk_weight:
            return energies.mean(2)
        return energies.mean(2) + risk_weight * tail(hazard(context, imagined, actions).amax(3)).to(energies)

    def cost(actions: Tensor) -> Tensor:
        return torch.cat([value(part) for part in actions.split(max(1, chunk // (b * z.shape[2])), 1)], 1)

    return cost


def tail(risks: Tensor) -> Tensor:
    """Mean over the worse half of K futures: [B, N, K] -> [B, N]."""
    return risks.sort(2, descending=True)[0][:, :, : (risks.shape[2] + 1) // 2].mean(2)


def look_ahead(model: WorldModel, context: Context, energy: Energy, actions: Tensor, z: Tensor) -> tuple[Features, Tensor]:
    """Imagined features of actions [B, N, H, A] under z [B, 1, K, H, Z], and their energies [B, N, K]."""
    patches = context.features.patches
    actions = actions.to(patches)
    imagined = model.rollout(context, actions, z.to(patches).expand(-1, actions.shape[1], -1, -1, -1))
    return imagined, energy(imagined, actions)
