"""The seam between world models and everything that plans with them.

Shape legend, used in every docstring and shape comment of the project:

    B problems   N candidates   H horizon   K sampled z   T context frames   A action dim, entries in [-1, 1]
    P patches    D features     S proprioception dim      Z latent dim       h, w pixels

Batch first, time next, features last. Images are uint8 RGB, rows from the top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Obs = Mapping[str, np.ndarray]
"""{"pixels": uint8 [..., h, w, 3], "proprio": float32 [..., S]}; a goal may be pixels alone. A model never reads
keys that start with "privileged/"."""


class Features(NamedTuple):
    """What a model knows of a state: patch features and, where known, proprioception (same leading axes)."""

    patches: Tensor  # float32 [..., P, D]
    proprio: Tensor | None = None  # float32 [..., S], metres and radians as observed

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Both changed, as by indexing leading axes; what is unknown stays unknown."""
        return Features(*(None if x is None else change(x) for x in self))


@dataclass(frozen=True)
class Context:
    """The past that a rollout starts from: the last T frames, and the T - 1 actions between them."""

    features: Features  # patches [B, T, P, D], proprio [B, T, S]
    actions: Tensor  # float32 [B, T - 1, A]
    held: Tensor | None = None  # float32 [B, S], proprioception when the gripper was told to close; NaN while it is open, as is None


def held_after(held: Tensor | None, proprio: Tensor, actions: Tensor) -> Tensor:
    """`Context.held` [..., S] after actions [..., A] at proprioception [..., S]; the last of A closes the gripper (-1) or opens it (1)."""
    held = torch.full_like(proprio, torch.nan) if held is None else held
    closes, opens = actions[..., -1:] < -0.5, actions[..., -1:] > 0.5
    return torch.where(opens, torch.nan, torch.where(closes & held.isnan(), proprio, held))


class Suggestion(NamedTuple):
    """Where a search for a plan may begin, and what it should look for."""

    actions: Tensor  # float32 [..., H, A] in [-1, 1]
    waypoint: Features  # patches [..., P, D] and proprio [..., S] of the goal, or of H steps ahead on the way to it
    chooses: bool = False  # whether it says when the gripper moves, or only where to


class EncoderSizes(Protocol):
    """What an encoder takes and gives."""

    image_size: int  # pixels, height and width of one view
    views: int  # cameras side by side
    grid: tuple[int, int]  # patch rows and columns of one frame
    patches: int  # P
    embed_dim: int  # D

    def own(self, pixels: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """The first views of pictures [..., h, w, 3], as many as the encoder sees; the data may have more cameras."""
        ...


class Encoder(Protocol):
    """Frozen map from images to patch features."""

    config: EncoderSizes

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [..., h, w, 3] -> float32 [..., P, D]."""
        ...


class WorldModel(Protocol):
    """Imagines the features that follow from actions.

    One may have `suggest(now, goals, horizon)`: of features, and those of the goals still ahead, the next one first, each [..., P, D]
    and [..., S], a Suggestion with the same leading axes, or None; `detour`, the same of a safer way; `read(patches)`, the
    proprioception [..., S] that encode reads off patches [..., P, D] of a goal without it, or None; and `views`, of how many cameras
    its pictures are, side by side (one, if it does not say).
    """

    action_dim: int
    latent_dim: int
    max_context: int  # most context frames that rollout uses

    def encode(self, obs: Obs) -> Features:
        """Obs with any leading axes -> Features with the same; without "proprio" in obs, Features.proprio is None."""
        ...

    def sample_z(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Standard noise [*shape, Z] that rollout maps through its prior; zeros (the prior's mean) without generator."""
        ...

    def rollout(self, context: Context, actions: Tensor, z: Tensor) -> Features:
        """context of B problems, actions [B, N, H, A], z [B, N, K, H, Z] -> Features with patches [B, N, K, H, P, D]."""
        ...


class Energy(Protocol):
    """How far imagined features are from its goal; lower is better."""

    def __call__(self, imagined: Features, actions: Tensor) -> Tensor:
        """patches [B, N, K, H, P, D], actions [B, N, H, A] -> [B, N, K]."""
        ...


class Hazard(Protocol):
    """How likely imagined steps are to go wrong."""

    def __call__(self, context: Context, imagined: Features, actions: Tensor) -> Tensor:
        """The past, and what is imagined after it: patches [B, N, K, H, P, D], actions [B, N, H, A] -> probabilities [B, N, K, H]."""
        ...


def to_tensor(array: np.ndarray | Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor over the same values, without a copy where that is safe."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    return tensor if dtype is None else tensor.to(dtype)
