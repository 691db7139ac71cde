"""V-JEPA 2-AC's action-conditioned predictor (arXiv 2506.09985, section 3.1), in the layout of its published weights.

Each frame is an action token, a state token and one token for every patch; a frame looks at itself and at all frames
before it. Patches have rotary positions in time, row and column, action and state in time alone. It is deterministic:
its z has no entries, so that samples of it say nothing about what is doubtful.

State [7]: position of the gripper in the robot's base frame (m), its extrinsic xyz Euler angles (rad), how far it is closed
(0 to 1). An action is the change of the state; the rotation that it names is applied after the present one, in the base
frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoder import Block, initialise, rotation
from worldmodel.interface import Features
from worldmodel.predictor import Cache, causal, frame_places

NAME = "vjepa2-ac"
_OWN = 2  # tokens of a frame that are not patches: action, state


@dataclass(frozen=True)
class ACConfig:
    """Sizes of an ACPredictor; the defaults are those of the published weights, for ViT-g at 256 pixels."""

    name: str = NAME
    feature_dim: int = 1408
    grid: tuple[int, int] = (16, 16)  # patch rows and columns
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    rope_base: float = 10000.0
    window: int = 8  # frames that a frame sees, itself included, as in the clips that it was trained on
    context: int = 1  # frames that a planner need remember: Meta's begins with the present one
    action_scale: tuple[float, ...] = (0.075, 0.075, 0.075, 0.0, 0.0, 0.0, 0.75)  # m, rad and closedness that an action
    # of 1 stands for; as planned by Meta: within 7.5 cm, without rotation
    proprio_dim: int = 7
    latent_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("grid", "action_scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        if self.name != NAME or self.proprio_dim != 7 or len(self.action_scale) != 7 or self.latent_dim:
            raise ValueError(f"expected {NAME} with states and actions of 7 numbers and no z, got {self}")

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.action_scale)


class NoLatent(NamedTuple):
    """A z without entries, [..., 0]: what a deterministic predictor has for prior and posterior."""

    mean: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The noise [..., 0] itself."""
        return noise


class ACPredictor(nn.Module):
    """One step of imagination, as `worldmodel.predictor.Predictor` does it, for actions in [-1, 1].

    The names of its modules are those of the published weights; `extrinsics_encoder` is among them, and unused.
    """

    def __init__(self, config: ACConfig = ACConfig()) -> None:
        super().__init__()
        self.config, dim = config, config.embed_dim
        self.patches = config.grid[0] * config.grid[1]
        self.predictor_embed = nn.Linear(config.feature_dim, dim)
        self.action_encoder = nn.Linear(config.action_dim, dim)
        self.state_encoder = nn.Linear(config.proprio_dim, dim)
        self.extrinsics_encoder = nn.Linear(config.proprio_dim - 1, dim)
        self.predictor_blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, config.feature_dim)
        initialise(self)

    def physical(self, actions: Tensor) -> Tensor:
        """Actions [..., 7] in [-1, 1] as changes of the state: metres, radians, closedness."""
        return actions * torch.tensor(self.config.action_scale, device=actions.device)

    def prior_of(self, now: Features, actions: Tensor) -> NoLatent:
        """There is no z: [..., 0]."""
        return NoLatent(actions[..., :0])

    def posterior_of(self, now: Features, actions: Tensor, after: Tensor) -> NoLatent:
        """There is no z: [..., 0]."""
        return NoLatent(actions[..., :0])

    def forward(
        self, now: Features, actions: Tensor, z: Tensor, cache: Cache | None = None, start: int = 0
    ) -> tuple[Features, Cache]:
        """The frames after `now`, as `Predictor.forward` gives them.

        now: layer-normed patches [B, T, P, D] and states [B, T, 7]; actions [B, T, 7] in [-1, 1]; z is not looked at.
        """
        changes = self.physical(actions)
        patches, kept = self.tokens(now.patches, changes, now.proprio, cache, start)
        return Features(F.layer_norm(patches.float(), patches.shape[-1:]), moved(now.proprio, changes)), kept

    def tokens(
        self, patches: Tensor, changes: Tensor, states: Tensor, cache: Cache | None = None, start: int = 0
    ) -> tuple[Tensor, Cache]:
        """Predicted features [B, T, P, D], not normed, of patches [B, T, P, D], changes and states [B, T, 7] as published."""
        config, steps, dtype = self.config, patches.shape[1], self.predictor_embed.weight.dtype
        own = torch.stack((self.action_encoder(changes.to(dtype)), self.state_encoder(states.to(dtype))), 2)
        x = torch.cat((own, self.predictor_embed(patches.to(dtype))), 2)  # [B, T, 2 + P, dim]
        length, x = x.shape[2], x.flatten(1, 2)
        where = frame_places(start, steps, config.grid, x.device, _OWN)
        by = rotation(where, config.embed_dim // config.num_heads, config.rope_base, tiled=True)
        before = cache[0][0].shape[2] // length if cache else 0
        mask = causal(before, steps, length, config.window, x.device)
        kept, keep = [], (config.window - 1) * length
        for i, block in enumerate(self.predictor_blocks):
            q, k, v = block.attn.heads(block.norm1(x), by)
            if cache:
                k, v = torch.cat((cache[i][0], k), 2), torch.cat((cache[i][1], v), 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(y)
            x = x + block.mlp(block.norm2(x))
            kept.append((k[:, :, -keep:], v[:, :, -keep:]) if keep else (k[:, :, :0], v[:, :, :0]))
        x = x.unflatten(1, (steps, length))[:, :, _OWN:]
        return self.predictor_proj(self.predictor_norm(x)), kept


def matrix_of(angles: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of extrinsic xyz Euler angles [..., 3], rad: first about x, then y, then z."""
    (a, b, c), (sa, sb, sc) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = (c * b, c * sb * sa - sc * a, c * sb * a + sc * sa), (sc * b, sc * sb * sa + c * a, sc * sb * a - c * sa), (-sb, b * sa, b * a)
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def angles_of(matrix: Tensor) -> Tensor:
    """Extrinsic xyz Euler angles [..., 3], rad, of rotation matrices [..., 3, 3]; the inverse of `matrix_of`."""
    y = torch.atan2(-matrix[..., 2, 0], torch.hypot(matrix[..., 2, 1], matrix[..., 2, 2]))
    x, z = torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2]), torch.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return torch.stack((x, y, z), -1)


def moved(states: Tensor, changes: Tensor) -> Tensor:
    """States [..., 7] after changes [..., 7]: positions add, rotations follow one another, closedness stays in 0..1."""
    here, by = states.double(), changes.double()
    turned = angles_of(matrix_of(by[..., 3:6]) @ matrix_of(here[..., 3:6]))
    closed = (here[..., 6:] + by[..., 6:]).clamp(0, 1)
    return torch.cat((here[..., :3] + by[..., :3], turned, closed), -1).to(states.dtype)


def change(states: Tensor, after: Tensor) -> Tensor:
    """The changes [..., 7] that lead from states [..., 7] to those after; the inverse of `moved`."""
    here, there = states.double(), after.double()
    turned = angles_of(matrix_of(there[..., 3:6]) @ matrix_of(here[..., 3:6]).transpose(-1, -2))
    return torch.cat((there[..., :3] - here[..., :3], turned, there[..., 6:] - here[..., 6:]), -1).to(states.dtype)
