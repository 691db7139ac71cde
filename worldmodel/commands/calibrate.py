"""Calibrate the safety gate: limits for what a planner's own decisions show, from what really followed them.

Plays episodes without a gate, and measures each decision's signals and whether its step had an unsafe event. The limit of
the hazard is the largest that keeps the share of decisions that are let go and go wrong within --risk (conformal risk
control); those of doubt, surprise and novelty are passed by at most --alarm of the decisions that went well (split
conformal prediction). Both hold for fresh episodes of the same task, model and planner, which the file names: a gate
refuses to start with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

SIGNALS = ("hazard", "doubt", "surprise", "novelty")


@dataclass(frozen=True)
class Config:
    """Whose decisions to calibrate, and how strictly."""

    out: Path
    """calibration.safetensors to write"""
    model: Path | None = None
    """model.safetensors (None: the shipped one)"""
    task: Literal["reach", "grasp", "reach-with-object", "pick-place"] = "pick-place"
    """what is done meanwhile"""
    object: Literal["box", "cup"] = "box"
    """with what"""
    goal: Literal["subgoals", "final"] = "subgoals"
    """what the planner is shown"""
    episodes: int = 60
    """episodes to play; each decision counts"""
    seed: int = 5000
    """seed of the first one; below 10000, where benchmarks begin"""
    risk: float = 0.05
    """share of decisions that may be let go and go wrong (0 to 1)"""
    alarm: float = 0.01
    """share of decisions that go well and may be refused by each of the other signals (0 to 1)"""
    risk_weight: float = 0.0
    """of the probability that a step goes wrong, in the planner's cost"""
    max_steps: int = 40
    """steps of an episode"""
    samples: int | None = None
    """the planner's candidates per iteration (default: 64)"""
    threads: int = 2
    """processor threads"""

    def __post_init__(self):
        for name, least in (("episodes", 2), ("max_steps", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {least}")
        if not (0 < self.risk < 1 and 0 < self.alarm < 1):
            raise ValueError(f"risk is {self.risk} and alarm {self.alarm}: expected more than 0, and less than 1")


def run(config: Config) -> dict:
    """Play, find the limits, write them."""
    import torch

    from planners.gate import Limits, SafetyGate, conformal_limit, controlled_limit
    from worldmodel.checkpoint import save_tensors
    from worldmodel.commands import bench
    from worldmodel.commands.policies import Player, calibrated_for
    from worldmodel.density import Density
    from worldmodel.hazard import auroc, calibration_error

    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; give a path that does not")
    played = bench.resolved(
        bench.Config(
            config.out, config.task, config.object, config.goal, episodes=config.episodes, seed=config.seed, model=config.model,
            threads=config.threads, max_steps=config.max_steps, risk_weight=config.risk_weight, samples=config.samples,
        )  # fmt: skip
    )
    player = Player(played)
    model = player._agent.model
    hazard = None if model.hazard is None else model.hazard.imagined
    seeds = range(config.seed, config.seed + config.episodes)
    first = max(1, config.episodes // 3)  # a third tells what is usual, the others how far from it is usual
    films = [player.play(seed)[1] for seed in tqdm(seeds[:first], desc="calibrate: what is usual", unit="episode")]
    density = Density.fit(torch.cat([model.encode({"pixels": film.frames}).patches for film in films]))
    player._agent.gate = SafetyGate(Limits(), hazard, density)
    taken = [one for seed in tqdm(seeds[first:], desc="calibrate: limits", unit="episode") for one in _decisions(player, seed)]
    player.close()
    values = {name: [one[name] for one in taken] for name in SIGNALS}
    wrong = [one["unsafe"] for one in taken]
    well = {name: [v for v, bad in zip(values[name], wrong) if not bad] for name in SIGNALS}
    limits = {name: conformal_limit(well[name], config.alarm) for name in SIGNALS[1:]}
    limits["hazard"] = float("inf") if hazard is None else controlled_limit(values["hazard"], wrong, config.risk)
    if limits["hazard"] == 0:
        raise ValueError(
            f"no limit keeps the risk within {config.risk}: {sum(wrong)} of {len(wrong)} decisions went wrong, whatever the "
            "hazard said; play more episodes, give a --risk-weight, or a higher --risk"
        )
    Limits(**limits)
    events = np.array(wrong)
    go = np.array([all(one[name] <= limits[name] for name in SIGNALS) for one in taken])
    about = {
        "decisions": len(taken), "unsafe": int(events.sum()),
        "auroc": {name: auroc(np.array(values[name]), events) for name in SIGNALS},
        "hazard_ece": calibration_error(np.array(values["hazard"]), events),
        "refused": float((~go).mean()), "let_go_and_wrong": float((go & events).mean()),
        "false_alarms": float((~go & ~events).sum() / max(1, (~events).sum())),
    }  # fmt: skip
    fields = {"limits": limits, "risk": config.risk, "alarm": config.alarm, "of": calibrated_for(played)}
    save_tensors(config.out, "calibration", {"mean": density.mean, "std": density.std}, _plain(fields), about)
    return {"out": str(config.out), "limits": limits, "risk": config.risk, "alarm": config.alarm, **about}


def _plain(fields: dict) -> dict:
    """Without infinity, which JSON lacks."""
    return {**fields, "limits": {name: value if np.isfinite(value) else None for name, value in fields["limits"].items()}}


def _decisions(player, seed: int) -> list[dict]:
    """The signals of an episode's decisions, each with whether its step was unsafe."""
    steps: list[dict] = []
    entry, _ = player.play(seed, steps)
    bad = {event["step"] - 1 for event in entry["unsafe"]}
    return [{**step["verdict"].signals, "unsafe": t in bad} for t, step in enumerate(steps) if step["verdict"].signals]


def report(result: dict) -> str:
    """The limits, and what they did here, in words."""
    rows = [f"{'signal':10}{'limit':>10}{'AUROC':>8}"]
    rows += [f"{name:10}{result['limits'][name]:10.4g}{result['auroc'][name]:8.2f}" for name in SIGNALS]
    return "\n".join(
        [
            *rows,
            f"{result['unsafe']} of {result['decisions']} decisions went wrong; the gate would have refused {result['refused']:.1%}, "
            f"{result['false_alarms']:.1%} of those that went well, and let go {result['let_go_and_wrong']:.1%} that went wrong "
            f"(limit {result['risk']:.0%})",
            f"written to {result['out']}",
        ]
    )
