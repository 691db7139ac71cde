"""Sub-goals that the stack finds by itself: the frames between the present and a goal at which the gripper acts.

A look ahead of a step or two cannot see that one must grasp before one can place. Demonstrations show it: between their
start and their end lie a frame at which the gripper has closed on something and one at which it is about to let go
(keyframes by the gripper's state: C2F-ARM, arXiv 2106.12534, section 3.2). The proposer first reads off the first frame
where the hand will close, and off the last where it will have opened, as demonstrations did; then it fills in the frames
themselves, in feature space, as a mask predictor fills in hidden patches: a coarse world model whose steps are keyframes.
The hand comes first because a picture in which it may be in several places is a blur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoder import Block, autocast, initialise, rotation
from worldmodel.interface import Features
from worldmodel.predictor import frame_places, merged, unmerged
from worldmodel.probe import AttentiveProbe

COUNT = 2  # keyframes: closed, which the first frame tells of, and about to open, of which the last one does


@dataclass(frozen=True)
class ProposerConfig:
    """Sizes of a Proposer."""

    feature_dim: int = 192
    grid: tuple[int, int] = (8, 8)  # patch rows and columns
    proprio_dim: int = 7
    merge: int = 2  # a token holds merge x merge patches
    embed_dim: int = 192
    depth: int = 4
    num_heads: int = 3
    rope_base: float = 100.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))  # JSON has lists only
        if self.grid[0] % self.merge or self.grid[1] % self.merge:
            raise ValueError(f"merge {self.merge} does not divide the grid of patches {self.grid}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} does not split into {self.num_heads} heads; expected a multiple")


class Proposer(nn.Module):
    """Fills in the COUNT keyframes between a frame and a goal."""

    def __init__(self, config: ProposerConfig = ProposerConfig()) -> None:
        super().__init__()
        self.config = config
        dim, squares = config.embed_dim, config.grid[0] * config.grid[1] // config.merge**2
        wide = config.feature_dim * config.merge**2
        self.embed = nn.Linear(wide, dim)
        self.proprio_embed = nn.Linear(config.proprio_dim, dim)
        self.place = nn.Parameter(torch.zeros(squares, dim))
        self.hidden = nn.Parameter(torch.zeros(COUNT, dim))  # what stands for a keyframe's tokens
        self.own = nn.Parameter(torch.zeros(dim))  # what stands for the goal's proprioception, which is not told
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, 4.0) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_features = nn.Linear(dim, wide)
        initialise(self)
        sizes = config.grid[0] * config.grid[1], config.feature_dim, config.proprio_dim
        self.hands = nn.ModuleList(AttentiveProbe(*sizes) for _ in range(COUNT))
        for parameter in (self.place, self.hidden, self.own):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.register_buffer("proprio_mean", torch.zeros(config.proprio_dim))
        self.register_buffer("proprio_std", torch.ones(config.proprio_dim))

    def forward(self, now: Features, goal: Tensor, hands: Tensor) -> Tensor:
        """Keyframes with these hands.

        now: patches [B, P, D] and proprio [B, S]; goal patches [B, P, D]; proprio of the keyframes, hands [B, COUNT, S]
        -> patches [B, COUNT, P, D].
        """
        config, batch = self.config, len(goal)
        ends = torch.stack((now.patches, goal), 1)
        first, last = (self.embed(merged(ends, config.grid, config.merge)) + self.place).unbind(1)  # [B, squares, dim]
        between = (self.hidden[:, None] + self.place).expand(batch, -1, -1, -1)  # [B, COUNT, squares, dim]
        pictures = torch.cat((first[:, None], between, last[:, None]), 1)
        told = torch.cat((now.proprio[:, None], hands), 1)
        told = self.proprio_embed((told - self.proprio_mean) / self.proprio_std)
        own = torch.cat((told, self.own.expand(batch, 1, -1)), 1)[:, :, None]  # [B, COUNT + 2, 1, dim]
        x = torch.cat((own, pictures), 2).flatten(1, 2)
        grid = config.grid[0] // config.merge, config.grid[1] // config.merge
        where = frame_places(0, COUNT + 2, grid, x.device)
        by = rotation(where, config.embed_dim // config.num_heads, config.rope_base)
        for block in self.blocks:
            x = block(x, by)
        x = self.norm(x).unflatten(1, (COUNT + 2, -1))[:, 1:-1, 1:]  # [B, COUNT, squares, dim]
        change = unmerged(self.to_features(x), config.grid, config.merge)
        return F.layer_norm((now.patches[:, None] + change).float(), change.shape[-1:])

    def hands_of(self, now: Tensor, goal: Tensor) -> Tensor:
        """Proprioception at the keyframes, from patches [B, P, D] of the present and of the goal: [B, COUNT, S]."""
        return torch.stack([hand(patches) for hand, patches in zip(self.hands, (now, goal))], 1)

    @torch.no_grad()
    def propose(self, now: Features, goal: Features) -> list[Features]:
        """Sub-goals on the way from features [P, D], [S] to a goal's, the goal last."""
        now, end = Features(now.patches[None], now.proprio[None]), goal.patches[None]
        hands = self.hands_of(now.patches, end)
        with autocast(end.device):
            patches = self(now, end, hands)
        return [*map(Features, patches[0], hands[0]), goal]
