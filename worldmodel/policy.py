"""A policy that sees a goal: what to do on the way to it, told from frozen features, seen or imagined.

It is where a world model's search for a plan begins, or acts by itself, to be compared with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.interface import Features
from worldmodel.probe import AttentiveProbe

GRIPPER = torch.tensor([-1.0, 0.0, 1.0])  # close, hold, open: a choice, as the planner's
STEPS = 30  # to a goal, that the network gives as 1
EXPECTILE = 0.3  # of the steps to a goal: less than half, for what matters is how soon one can be there


class Policy(nn.Module):
    """Maps what is seen now and in a goal picture, as a frozen encoder's features, to an action, and tells how far the goal is."""

    def __init__(self, patches: int, features: int, proprio_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.look = AttentiveProbe(patches, features, width)
        self.act = nn.Sequential(
            nn.LayerNorm(2 * width + proprio_dim), nn.Linear(2 * width + proprio_dim, 2 * width), nn.GELU(),
            nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, action_dim - 1 + len(GRIPPER) + 1),
        )  # fmt: skip
        self.register_buffer("proprio_mean", torch.zeros(proprio_dim))
        self.register_buffer("proprio_std", torch.ones(proprio_dim))
        self.register_buffer("gripper", GRIPPER, persistent=False)

    def forward(self, now: Features, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """now and goal patches [B, P, D] -> motion [B, A - 1], logits [B, 3] of close, hold, open, and steps to the goal [B]."""
        own = self.proprio_mean.dtype
        proprio = (now.proprio.to(own) - self.proprio_mean) / self.proprio_std
        out = self.act(torch.cat((self.look(now.patches.to(own)), self.look(goal.to(own)), proprio), 1)).float()
        return *out[:, :-1].tensor_split((-len(GRIPPER),), 1), STEPS * out[:, -1]

    @torch.no_grad()
    def choose(self, now: Features, goal: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B, A] from patches [B, P, D] and proprio [B, S] towards goals' patches [B, P, D].

        The gripper's choice is drawn, or without a generator the likeliest.
        """
        motion, logits, _ = self(now, goal)
        drawn = logits.argmax(1, keepdim=True) if generator is None else torch.multinomial(logits.softmax(1), 1, generator=generator)
        return torch.cat((motion, self.gripper[drawn]), 1).clamp(-1, 1)

    def loss(self, now: Features, goal: Tensor, actions: Tensor, steps: Tensor, log_above: float = 0.0) -> Tensor:
        """L1 of the motion plus cross-entropy of the gripper's choice, for actions [B, A], plus the expectile loss of the steps [B].

        NaN of the steps: not known. Above `log_above` the motion counts by its logarithm (an inverse hyperbolic sine), so that a
        centimetre beside a thing weighs more than one on the long way there; the L1's minimum, a median, stays where it was.
        """
        motion, logits, guess = self(now, goal)
        told = actions[:, :-1]
        if log_above:
            motion, told = (torch.asinh(x / log_above) / math.asinh(1 / log_above) for x in (motion, told))
        choice = (actions[:, -1:] - self.gripper).abs().argmin(1)
        off = (steps.nan_to_num() - guess) * ~steps.isnan() / STEPS
        far = (torch.where(off < 0, 1 - EXPECTILE, EXPECTILE) * off.square()).mean()
        return (motion - told).abs().mean() + F.cross_entropy(logits, choice) + far
