"""Which actions lead straight from one proprioception to another: where a search begins that no policy begins.

Linear in both directions, by least squares over the training data; it knows no obstacle. A few candidates around it do what
many do elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.data import Frames

RIDGE = 0.01  # of the inverse, in the deviations of the data's changes: what hardly ever changes asks for no action


class Guide(nn.Module):
    """Actions of A numbers for proprioceptions of S."""

    def __init__(self, proprio_dim: int, action_dim: int) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.zeros(proprio_dim, action_dim))  # a change's action
        self.register_buffer("effect", torch.zeros(action_dim, proprio_dim))  # an action's change

    def forward(self, now: Tensor, goal: Tensor, horizon: int) -> Tensor:
        """Proprioception now and of a goal, each [..., S] -> actions [..., H, A] in [-1, 1]."""
        actions = []
        for _ in range(horizon):
            actions.append(((goal - now) @ self.inverse).clamp(-1, 1))
            now = now + actions[-1] @ self.effect
        return torch.stack(actions, -2)


def fit_guide(frames: Frames) -> Guide:
    """The guide of all steps of the data."""
    steps = frames.every_clip(2)[:, 0]
    change, actions = (frames.proprio[steps + 1] - frames.proprio[steps]).astype(float), frames.actions[steps].astype(float)
    guide = Guide(change.shape[1], actions.shape[1])
    scale = change.std(0).clip(1e-9)
    scaled = change / scale
    inverse = np.linalg.solve(scaled.T @ scaled + RIDGE * len(steps) * np.eye(len(scale)), scaled.T @ actions) / scale[:, None]
    effect = np.linalg.lstsq(actions, change, rcond=None)[0]
    guide.inverse.copy_(torch.from_numpy(inverse))
    guide.effect.copy_(torch.from_numpy(effect))
    return guide
