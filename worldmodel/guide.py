"""Which actions lead from one proprioception to another, without a look at the scene: where a sampling planner begins.

The straight way is linear in both directions, by least squares over the training data, and knows no obstacle. The learned
way is behaviour cloning of demonstrations, of proprioception alone: it comes down from above, and lifts before it carries.
A few candidates around either do what many do elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.data import Frames

RIDGE = 0.01  # of the inverse, in the deviations of the data's changes: what hardly ever changes asks for no action
WIDTH = 192  # of the learned way's hidden layers
NEAR = 0.02  # m; nearer to a goal than this the learned way's own errors count, and the straight one is as good
WIDER = 0.015  # m; a goal with the gripper wider open than now by more is reached by letting go, wherever the hand is
REACH = 0.05  # m or rad of a goal's distance that the network sees as 1


class Way(nn.Module):
    """The learned way: an action from proprioception now and where it is to lead."""

    def __init__(self, proprio_dim: int, action_dim: int) -> None:
        super().__init__()
        sizes = 2 * proprio_dim, WIDTH, WIDTH, action_dim
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.GELU())]
        self.net = nn.Sequential(*layers[:-1])
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))

    def forward(self, now: Tensor, goal: Tensor) -> Tensor:
        """Proprioception now and of a goal, each [..., S] -> the next action [..., A]."""
        return self.net(torch.cat(((now - self.proprio_mean) / self.proprio_std, (goal - now) / REACH), -1))


class Guide(nn.Module):
    """Actions of A numbers for proprioceptions of S; with a `way`, that begin with the position (m) and end with the opening (m)."""

    def __init__(self, proprio_dim: int, action_dim: int, way: Way | None = None) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.zeros(proprio_dim, action_dim))  # a change's action
        self.register_buffer("effect", torch.zeros(action_dim, proprio_dim))  # an action's change
        self.way = way

    def forward(self, now: Tensor, goal: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Proprioception now and of a goal, each [..., S] -> actions [..., H, A] in [-1, 1], and what they should reach [..., S].

        That is the goal on the straight way. On the learned one it is where they lead, but with the goal's opening, which
        tells why to go there: a plan that is judged by a goal around the corner cuts it.
        """
        straight, _ = self._follow(lambda there: (goal - there) @ self.inverse, now, horizon)
        if self.way is None:
            return straight, goal
        learned, end = self._follow(lambda there: self.way(there, goal), now, horizon)
        end = torch.cat((end[..., :-1], goal[..., -1:]), -1)
        left = goal - now
        apt = (left[..., :3].norm(dim=-1, keepdim=True) >= NEAR) & (left[..., -1:] <= WIDER)
        return torch.where(apt[..., None], learned, straight), torch.where(apt, end, goal)

    def _follow(self, choose: Callable[[Tensor], Tensor], now: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Actions [..., H, A] that are chosen one by one, and where they lead on average [..., S]."""
        actions = []
        for _ in range(horizon):
            actions.append(choose(now).clamp(-1, 1))
            now = now + actions[-1] @ self.effect
        return torch.stack(actions, -2), now


def fit_guide(frames: Frames) -> Guide:
    """The guide of all steps of the data, without a learned way."""
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
