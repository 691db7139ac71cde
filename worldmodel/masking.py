"""Which tokens the context encoder sees and which it must predict.

Multi-block space-time masks (V-JEPA 2, arXiv 2506.09985, section 2.1), masks of the future, and I-JEPA's masks of
single images (arXiv 2301.08243, section 3). Each sample has its own mask; within a batch the counts are cut to the
smallest, so that everything stays a dense tensor, and on to a multiple of COUNT, so that few shapes occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


COUNT = 4  # a step with tensors of shapes that were seen before is replayed on a GPU, any other launched kernel by kernel


class Masks(NamedTuple):
    """Indices into the L tokens of each clip: visible int64 [B, V] and hidden int64 [B, M], disjoint."""

    visible: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class MaskConfig:
    """One way to hide tokens.

    Blocks cover `scale` of the frame each, at an aspect ratio from `aspect`, over a random run of `duration` (a share
    of the clip's time, 1 = all of it, as V-JEPA; less leaves every patch visible at some time). `future` hides all
    that follows a random first part of the clip. `kind="image"` is I-JEPA's: a context block minus the targets. `kind="open"`
    hides nothing, for losses on visible tokens.
    """

    kind: str = "blocks"  # blocks | future | image | open
    blocks: int = 8
    scale: tuple[float, float] = (0.15, 0.15)
    aspect: tuple[float, float] = (0.75, 1.5)
    duration: float = 1.0
    least: float = 0.15  # a mask that shows or hides a smaller share of the tokens is drawn again

    def __post_init__(self) -> None:
        if self.kind not in ("blocks", "future", "image", "open"):
            raise ValueError(f"unknown mask kind {self.kind!r}; known: blocks, future, image, open")
        if self.blocks < 1 or not 0 < self.duration <= 1:
            raise ValueError(f"expected blocks >= 1 and 0 < duration <= 1, got {self.blocks} and {self.duration}")


KINDS = {
    "short": MaskConfig(blocks=8, scale=(0.15, 0.15)),
    "long": MaskConfig(blocks=2, scale=(0.7, 0.7)),
    "half": MaskConfig(blocks=8, scale=(0.15, 0.25), duration=0.5),
    "future": MaskConfig(kind="future"),
    "image": MaskConfig(kind="image", blocks=4, scale=(0.15, 0.2)),
    "open": MaskConfig(kind="open"),
}
"""The masks that recipes name: V-JEPA's two groups, blocks over half of the time, the future, I-JEPA's, none."""


def block(grid: tuple[int, int], scale: float, aspect: float, rng: np.random.Generator) -> np.ndarray:
    """One rectangle of about `scale` of the frame at a random place: bool [rows, columns]."""
    rows, columns = grid
    area = scale * rows * columns
    height = min(max(round((area * aspect) ** 0.5), 1), rows)
    width = min(max(round((area / aspect) ** 0.5), 1), columns)
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    out = np.zeros(grid, bool)
    out[top : top + height, left : left + width] = True
    return out


def hide(config: MaskConfig, steps: int, grid: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Visible and hidden tokens of one clip: two bool [steps, rows, columns], disjoint."""
    hidden = np.zeros((steps, *grid), bool)
    seen = np.ones((steps, *grid), bool)
    if config.kind == "future":
        hidden[rng.integers(1, steps) if steps > 1 else 0 :] = True
    else:
        run = max(1, round(config.duration * steps))
        for _ in range(config.blocks):
            start = rng.integers(steps - run + 1)
            hidden[start : start + run] |= block(grid, rng.uniform(*config.scale), rng.uniform(*config.aspect), rng)
    if config.kind == "image":
        seen &= block(grid, rng.uniform(0.85, 1.0), 1.0, rng)
    return seen & ~hidden, hidden


def draw(config: MaskConfig, batch: int, steps: int, grid: tuple[int, int], rng: np.random.Generator) -> Masks:
    """Masks for a batch; surplus tokens of a sample are dropped at random, order is kept.

    Redrawing what shows or hides less than `config.least` keeps one unlucky sample from emptying the whole batch.
    Raises ValueError where hardly any mask of this kind fits, as one of the future in a clip of one tubelet.
    """
    if config.kind == "open":
        every = torch.arange(steps * grid[0] * grid[1]).expand(batch, -1)
        return Masks(every, every[:, :0])
    pairs, least, tries = [], max(1, int(config.least * steps * grid[0] * grid[1])), 0
    while len(pairs) < batch:
        tries += 1
        if tries > 100 * batch:
            raise ValueError(f"no masks {config} fit clips of {steps} x {grid[0]} x {grid[1]} tokens; take longer clips or other masks")
        seen, hidden = (m.ravel().nonzero()[0] for m in hide(config, steps, grid, rng))
        if len(seen) >= least and len(hidden) >= least:
            pairs.append((seen, hidden))
    counts = [min(len(p[i]) for p in pairs) for i in (0, 1)]
    counts = [n - n % COUNT if n > COUNT else n for n in counts]
    cut = [np.stack([np.sort(rng.choice(p[i], counts[i], replace=False)) for p in pairs]) for i in (0, 1)]
    return Masks(*(torch.from_numpy(c) for c in cut))
