"""Calibrate the safety gate: limits for what a planner's own decisions show, from what really followed them.

Plays episodes with a gate that has no limits, and measures each decision's signals and whether its step had an unsafe event.
The limit of the hazard is the largest that keeps the share of an episode's decisions that are let go and go wrong, in the mean
over episodes, within --risk (conformal risk control); those of doubt, surprise, novelty and mismatch are passed by a decision that
goes well in at most a share --alarm of the episodes (split conformal prediction), with 0 in as few as these episodes can tell. Both
hold for fresh episodes of the same task, model and planner, all of whose flags the file names: a gate refuses to start with others,
and warns of another object or randomization. They are of decisions made without the gate; what it refuses leads elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from worldmodel.commands import bench, workers
from worldmodel.commands.episodes import player_of, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from worldmodel.density import Density

SIGNALS = ("hazard", "doubt", "surprise", "novelty", "mismatch")


@dataclass(frozen=True)
class Config(bench.Config):
    """Whose decisions to calibrate, as for `bench`, and how strictly."""

    out: Path
    """calibration.safetensors to write"""
    episodes: int = 90
    """episodes to play: a third tells what pictures are usual, the others the limits"""
    seed: int = 9500
    """seed of the first one; below 10000, where benchmarks begin, and above 9499, up to which the shipped weights were trained"""
    workers: int = 1
    """number of processes; changes no result"""
    threads: int = 2
    """processor threads of each"""
    risk: float = 0.05
    """share of an episode's decisions that may be let go and go wrong (more than 0, less than 1)"""
    alarm: float = 0.05
    """share of the episodes in which each of the other signals may refuse a decision that goes well (less than 1); 0: the least that can
    be told, one in as many as limits come from and one more: what is further off than all that went well there"""

    def __post_init__(self):
        if self.gate != "off" or self.policy not in bench.BUDGETS or self.trajectory or self.realtime or self.record or self.suite or self.video:
            raise ValueError(
                "limits come from a planner's decisions without a gate: leave --gate, --policy, --trajectory, --realtime, --record, --suite and --video"
            )
        if self.episodes < 3:
            raise ValueError(f"episodes is {self.episodes}, expected at least 3")
        super().__post_init__()
        if not (0 < self.risk < 1 and 0 <= self.alarm < 1):
            raise ValueError(f"risk is {self.risk} and alarm {self.alarm}: expected more than 0, or of the alarm 0, and less than 1")
        least = 1 / min(rate for rate in (self.risk, self.alarm) if rate) - 1  # episodes that limits come from
        if self.episodes - _first(self.episodes) < least - 1e-9:
            raise ValueError(
                f"a risk of {self.risk} and an alarm of {self.alarm} take limits from at least {math.ceil(least - 1e-9)} episodes, two thirds of "
                f"--episodes {self.episodes}: play more, or allow more"
            )


def run(config: Config) -> dict:
    """Play, find the limits, write them."""
    import torch

    from worldmodel.checkpoint import save_tensors
    from worldmodel.commands.policies import calibrated_for
    from worldmodel.density import Density

    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; give a path that does not")
    played = bench.resolved(bench.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(bench.Config)}))
    player = player_of(played)
    try:
        player.begin(config.seed)  # notices what is wrong before anything takes long
        if getattr(player.model, "hazard", None) is None:
            raise ValueError(
                f"{played.model} has no hazard head, which tells what may go wrong; `worldmodel train` makes one of data in which each episode says "
                "what was unsafe"
            )
        imagined_by = getattr(player.model, "imagined_by", None)
        seeds, first = range(config.seed, config.seed + config.episodes), _first(config.episodes)
        density = Density.fit(torch.cat(_each(_usual, played, None, seeds[:first], "what is usual")))
        episodes = _each(_decisions, played, density, seeds[first:], "limits")
    finally:
        player.close()
        player_of.cache_clear()
    limits = limits_for(episodes, config.risk, config.alarm)
    about = judged(episodes, limits)
    told = {name: value if np.isfinite(value) else None for name, value in limits.items()}  # JSON lacks infinity
    fields = {"limits": told, "risk": config.risk, "alarm": config.alarm, "of": calibrated_for(played) | {"imagined_by": imagined_by}}
    save_tensors(config.out, "calibration", {"mean": density.mean, "std": density.std}, fields, about)
    return {"out": str(config.out), "limits": limits, "risk": config.risk, "alarm": config.alarm, **about}


def _first(episodes: int) -> int:
    """How many episodes tell what pictures are usual; the others tell the limits."""
    return max(1, episodes // 3)


def limits_for(episodes: list[list[dict]], risk: float, alarm: float) -> dict[str, float]:
    """The limits from the decisions of episodes: their signals, and `unsafe`. Raises ValueError where none will do."""
    from planners.gate import conformal_limit, controlled_limit

    known = [own for own in episodes if own]
    if not known:
        raise ValueError("the gate refused all decisions without looking at a limit: the pictures show nothing, or stand still, or z has no effect")
    wrong = [[one["unsafe"] for one in own] for own in known]
    limits = {"hazard": controlled_limit([[one["hazard"] for one in own] for own in known], wrong, risk)}
    if limits["hazard"] == 0:
        count, total = sum(map(sum, wrong)), sum(map(len, wrong))
        raise ValueError(
            f"no limit keeps the risk within {risk}: {count} of {total} decisions went wrong in {len(known)} episodes; play more "
            "episodes, or give a --risk-weight or a higher --risk"
        )
    for name in SIGNALS[1:]:
        largest = [max((one[name] for one in own if not one["unsafe"]), default=0.0) for own in known]
        limits[name] = max(conformal_limit(largest, max(alarm, 1 / (len(largest) + 1))), 1e-9)
    return limits


def judged(episodes: list[list[dict]], limits: dict[str, float]) -> dict:
    """What the limits do to the decisions they come from, and how well each signal tells what goes wrong."""
    from worldmodel.hazard import auroc, calibration_error

    known = [own for own in episodes if own]
    taken = [one for own in known for one in own]
    events = np.array([one["unsafe"] for one in taken], bool)
    go = np.array([all(one[name] <= limits[name] for name in SIGNALS) for one in taken], bool)
    return {
        "episodes": len(episodes), "decisions": len(taken), "unsafe": int(events.sum()),
        "auroc": {name: auroc(np.array([one[name] for one in taken]), events) for name in SIGNALS},
        "hazard_ece": calibration_error(np.array([one["hazard"] for one in taken]), events),
        "refused": float((~go).mean()), "let_go_and_wrong": float((go & events).mean()),
        "episode_risk": float(np.mean([part.mean() for part in np.split(go & events, np.cumsum([len(own) for own in known])[:-1])])),
        "false_alarms": float((~go & ~events).sum() / max(1, (~events).sum())),
    }  # fmt: skip


def _each(what: Callable, config: bench.Config, density, seeds: Sequence[int], title: str) -> list:
    """What follows from the episodes of these seeds, in their order, here or in worker processes."""
    bar = functools.partial(tqdm, total=len(seeds), desc=title, unit="episode")
    if config.workers == 1:
        return [what(config, density, seed) for seed in bar(seeds)]
    with workers.pool(min(config.workers, len(seeds)), config.threads, prepare, config) as pool:
        return [workers.result(future) for future in bar([pool.submit(what, config, density, seed) for seed in seeds])]


def _usual(config: bench.Config, density: None, seed: int) -> Tensor:
    """Features [M, P, D] of an episode's pictures."""
    from planners.interface import OpenGate

    player = player_of(config)
    player.agent.gate = OpenGate()
    return player.model.encode({"pixels": player.play(seed)[1].frames}).patches.cpu()  # another process reads them


def _decisions(config: bench.Config, density: Density, seed: int) -> list[dict]:
    """The signals of an episode's decisions, each with whether its step was unsafe; those of a goal count as a picture's."""
    from planners.gate import Limits

    player, steps = player_of(config), []
    player.agent.gate = player.gate_of(Limits(), density)
    entry, *_ = player.play(seed, steps)
    bad = {event["step"] - 1 for event in entry["unsafe"]}
    known = [(t, step["verdict"].signals) for t, step in enumerate(steps) if step["verdict"].signals]
    return [{**s, "novelty": max(s["novelty"], s["goal_novelty"]), "unsafe": t in bad} for t, s in known]


def report(result: dict) -> str:
    """The limits, and what they did here, in words."""
    rows = [f"{'signal':10}{'limit':>10}{'AUROC':>8}"]
    told = lambda value, form, none: format(value, form) if np.isfinite(value) else none  # noqa: E731
    rows += [f"{name:10}{told(result['limits'][name], '.4g', 'none'):>10}{told(result['auroc'][name], '.2f', '-'):>8}" for name in SIGNALS]
    return "\n".join(
        [
            *rows,
            f"{result['unsafe']} of {result['decisions']} decisions in {result['episodes']} episodes went wrong; the gate would have "
            f"refused {result['refused']:.1%}, {result['false_alarms']:.1%} of those that went well, and let go "
            f"{result['let_go_and_wrong']:.1%} that went wrong; of an episode's {result['episode_risk']:.1%} in the mean (risk {result['risk']:.1%})",
            f"written to {result['out']}",
        ]
    )
