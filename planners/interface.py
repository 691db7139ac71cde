"""What a planner sees, what it returns, and what a gate says about it.

    B problems   N candidates   H horizon   K sampled z   A action dim, entries in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worldmodel.interface import Context, Features


class Cost(Protocol):
    """How bad candidate plans are; the only thing a planner sees. NaN counts as the worst."""

    def __call__(self, actions: Tensor) -> Tensor:
        """actions [B, N, H, A] -> [B, N]; the value of a candidate does not depend on its neighbours."""
        ...


@dataclass(frozen=True)
class Plan:
    """The actions to run, and what they cost."""

    actions: Tensor  # float32 [B, H, A], exactly what would run
    cost: Tensor  # float32 [B], equals cost(actions[:, None])[:, 0] but for rounding; infinite where that is NaN
    elite_std: Tensor  # float32 [B, H, A], how far apart the last candidates were that the plan was refined from


class Planner(Protocol):
    """Searches actions of low cost.

    One may have `eager` and `cautious`, Planners that the agent asks instead where there is no progress, and where a plan was
    refused; and `choices`, action dimensions that a suggestion leaves alone unless it chooses them.
    """

    def plan(self, cost: Cost, warm_start: Tensor, generator: torch.Generator) -> Plan:
        """Improve on warm_start [B, H, A] (zeros where nothing is known); all randomness comes from the generator."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Whether a plan may run."""

    go: bool
    score: float  # what was measured; lower is safer
    limit: float  # the highest score that may run
    why: str  # one sentence
    signals: Mapping[str, float] = field(default_factory=dict)  # what was measured, by name
    risk: float | None = None  # how likely it is to go wrong, as a share of what may be; None: score and limit say that

    @property
    def danger(self) -> float:
        """The risk, or else the score."""
        return self.score if self.risk is None else self.risk

    def worries(self, share: float) -> bool:
        """Whether the plan may not run, or its danger is above a share of what may be."""
        return not self.go or self.danger > share * (self.limit if self.risk is None else 1.0)


@dataclass(frozen=True)
class Seen:
    """What has been seen when a plan is judged."""

    now: Features  # of the last picture: patches [P, D], proprio [S]
    goal: Features  # that is pursued: patches [P, D]
    pixels: np.ndarray  # uint8 [h, w, 3], the last picture
    expected: Features | None = None  # of the last picture, as imagined a step ago under K sampled z: patches [K, P, D]
    still: int = 0  # how many pictures before the last one were the same to the bit, of one camera, although the robot was told to move
    context: Context | None = None  # the past that the plan was made for; None: all that is known of it is `now`
    views: int = 1  # cameras side by side in `pixels` that the model looks through
    off: Tensor | None = None  # proprioception [S] less what the model reads of it off the last picture; None: it reads none


def by_camera(pixels: np.ndarray, views: int) -> list[np.ndarray]:
    """The first views of pictures [h, w, 3] side by side, each on its own: there may be more; one picture where they do not divide."""
    height, width = pixels.shape[:2]
    if width % height == 0 and width > views * height:
        pixels = pixels[:, : views * height]
    return np.split(pixels, views, axis=1) if pixels.shape[1] % views == 0 else [pixels]


class Gate(Protocol):
    """Judges the plan that a planner has chosen."""

    def judge(self, plan: Plan, imagined: Features, seen: Seen) -> Verdict:
        """A plan [1, H, A], its futures under K sampled z, patches [K, H, P, D], and what has been seen."""
        ...


@dataclass(frozen=True)
class OpenGate:
    """Lets every plan run."""

    def judge(self, plan: Plan, imagined: Features, seen: Seen) -> Verdict:
        """Always go."""
        return Verdict(True, 0.0, float("inf"), "no gate")
