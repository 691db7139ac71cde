"""The safety gate: lets a plan run where what is known of it stays within calibrated limits, and says why where not.

Five signals, each against its own limit; the verdict's score is the largest share of a limit, so its own limit is 1.

    hazard     how likely the step that would run is to go wrong, at most over the sampled futures
    doubt      how far the sampled futures lie apart: what z leaves open
    surprise   how far the last picture was from the nearest future that had been imagined of it
    novelty    how unlike what the limits come from the last picture is, and the goal's: z says nothing of what was never seen
    mismatch   how far the robot feels itself from where the last picture shows it: an old picture, or a camera that was moved

Some things are refused whatever the limits are: numbers that are not finite, a picture that shows nothing, a camera that
stands still while the robot moves, sampled futures that do not differ although they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, inf, isfinite

import torch
from torch import Tensor

from planners.interface import Plan, Seen, Verdict, by_camera
from worldmodel.interface import Context, Features, Hazard

BLANK = 3.0  # grey levels: a picture that deviates less from its mean shows nothing
STILL = 2  # pictures that are the same to the bit while the robot is told to move
WORDS = {
    "hazard": "the plan is likely to go wrong",
    "doubt": "the imagined futures lie far apart",
    "surprise": "the last step came out unlike anything that was imagined of it",
    "novelty": "the picture is unlike any that the limits come from",
    "mismatch": "the picture does not show the robot where it feels itself: it is old, or its camera has moved",
    "goal_novelty": "the goal's picture is unlike any that the limits come from",
}


@dataclass(frozen=True)
class Limits:
    """The highest values that may pass; infinite: any."""

    hazard: float = inf
    doubt: float = inf
    surprise: float = inf
    novelty: float = inf
    mismatch: float = inf  # in the units of proprioception

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"the limit of {name} is {value}: expected more than 0")


@dataclass(frozen=True)
class SafetyGate:
    """Judges a plan by its imagined futures and by what has been seen.

    `hazard` and `novelty` are functions of a model; without them their signals are 0. Of the plan, the first step is judged:
    the agent asks again before each. `sampled` says that futures should differ: the model has a z, and several were drawn.
    """

    limits: Limits
    hazard: Hazard | None = None
    novelty: Callable[[Tensor], Tensor] | None = None  # patches [..., P, D] -> [...]
    sampled: bool = True

    @torch.no_grad()
    def judge(self, plan: Plan, imagined: Features, seen: Seen) -> Verdict:
        """Go where no limit is passed; see the module."""
        if why := self._broken(plan, imagined, seen):
            return Verdict(False, inf, 1.0, why)
        values = self.signals(plan, imagined, seen)
        if strange := [name for name, value in values.items() if not isfinite(value)]:
            return Verdict(False, inf, 1.0, f"{strange[0]} is not a finite number", values)
        limits = asdict(self.limits) | {"goal_novelty": self.limits.novelty}
        shares = {name: value / limits[name] for name, value in values.items()}
        worst = max(shares, key=shares.get)
        go = shares[worst] <= 1
        blind = self.hazard is None and not self.sampled
        passed = "within the limits of surprise and novelty, all there is without samples of z" if blind else "within all limits"
        why = passed if go else f"{WORDS[worst]}: {worst} {values[worst]:.3g} over {limits[worst]:.3g}"
        return Verdict(go, shares[worst], 1.0, why, values, risk=shares["hazard"])

    def signals(self, plan: Plan, imagined: Features, seen: Seen) -> dict[str, float]:
        """The values that limits are for."""
        run = slice(0, 1)
        futures = imagined.map(lambda x: x[None, None, :, run])
        novelty = self.novelty or (lambda patches: torch.zeros(()))
        values = {"hazard": 0.0, "doubt": spread(imagined.patches[:, run]), "surprise": 0.0,
                  "novelty": float(novelty(seen.now.patches)), "goal_novelty": float(novelty(seen.goal.patches)),
                  "mismatch": 0.0 if seen.off is None else float(seen.off.abs().max())}  # fmt: skip
        if self.hazard is not None:
            context = seen.context or Context(seen.now.map(lambda x: x[None, None]), plan.actions[:, :0])
            values["hazard"] = float(self.hazard(context, futures, plan.actions[:, None, run]).max())
        if seen.expected is not None:
            values["surprise"] = float((seen.expected.patches - seen.now.patches).abs().mean((-2, -1)).min())
        return values

    def _broken(self, plan: Plan, imagined: Features, seen: Seen) -> str | None:
        """What needs no limit to be refused."""
        tensors = (plan.actions, imagined.patches, imagined.proprio, seen.now.patches, seen.now.proprio, seen.goal.patches)
        if not all(torch.isfinite(x).all() for x in tensors if x is not None):
            return "features hold NaN or infinity"
        if any(picture.std() < BLANK for picture in by_camera(seen.pixels, seen.views)):
            return "the camera shows nothing: all pixels are alike" if seen.views == 1 else "a camera shows nothing: all its pixels are alike"
        if seen.still >= STILL:
            return f"the camera stands still: the last {seen.still + 1} pictures are the same while the robot moves"
        if self.sampled and len(imagined.patches) > 1 and bool((imagined.patches == imagined.patches[:1]).all()):
            return "the sampled futures are all the same: z has no effect"
        return None


def spread(patches: Tensor) -> float:
    """Standard deviation over K futures [K, H, P, D], meaned over features, of the step where it is largest."""
    off = patches - patches.mean(0)  # torch's `std` takes five times as long
    return float(off.square().mean(0).sqrt().mean((-2, -1)).max())


def conformal_limit(scores: list[float], rate: float) -> float:
    """The limit that a fresh score passes with probability of at most `rate`; infinite where there are too few scores.

    Split conformal prediction: the ceil((n + 1) (1 - rate))-th of n exchangeable scores (Vovk et al. 2005). Steps of one
    episode are not exchangeable; give one score for each episode, its largest.
    """
    n = len(scores)
    rank = ceil((n + 1) * (1 - rate))
    return sorted(scores)[rank - 1] if 0 < rank <= n else inf


def controlled_limit(scores: list[list[float]], events: list[list[bool]], risk: float) -> float:
    """The largest limit for which at most `risk` of a fresh episode's decisions, in expectation, are let go and go wrong.

    scores and events of the decisions of each of E episodes. Conformal risk control (Angelopoulos et al., arXiv 2208.02814):
    an episode's loss, the share of its decisions that are let go and wrong, grows with the limit and is at most 1, so
    (sum of losses + 1) / (E + 1) <= risk bounds its expectation, for exchangeable episodes. 0 where no limit does.
    """
    pairs = sorted((score, event / len(own)) for own, happened in zip(scores, events) for score, event in zip(own, happened))
    total, limit = 1.0, 0.0
    if total / (len(scores) + 1) > risk:
        return limit
    for i, (score, loss) in enumerate(pairs):
        total += loss
        if total / (len(scores) + 1) > risk:
            return limit
        if i + 1 == len(pairs) or pairs[i + 1][0] > score:
            limit = score
    return inf
