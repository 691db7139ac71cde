"""The contracts of a planner and a gate, as functions that raise AssertionError with a line that says what is broken.

For your own: `check_planner(MyPlanner())`, `check_gate(MyGate())`. What they need of `torch` and `numpy` they bring along.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from planners.interface import Gate, Plan, Planner, Seen, Verdict
from worldmodel.interface import Features


def check_planner(planner: Planner, action_dim: int = 4, horizon: int = 3, problems: int = 2) -> None:
    """A planner gives what the agent relies on.

    Its plans are [B, H, A] inside [-1, 1], cost what they say, are never worse than the warm start, depend on the
    generator alone, and NaN never wins.
    """
    wanted = torch.linspace(-0.6, 0.6, horizon * action_dim).reshape(1, horizon, action_dim).expand(problems, -1, -1)

    def cost(actions: Tensor) -> Tensor:
        return (actions - wanted[:, None]).square().mean((2, 3))

    warm = torch.zeros(problems, horizon, action_dim)
    before = torch.get_rng_state()
    plan = planner.plan(cost, warm, torch.Generator().manual_seed(0))
    assert isinstance(plan, Plan), f"plan(...) returned {type(plan).__name__}: expected planners.interface.Plan"
    shape = (problems, horizon, action_dim)
    for name in ("actions", "cost", "elite_std"):
        assert isinstance(getattr(plan, name), Tensor), f"{name} is {type(getattr(plan, name)).__name__}: expected a torch.Tensor"
    assert plan.actions.shape == shape, f"actions are {list(plan.actions.shape)}: expected [B, H, A] = {list(shape)}"
    assert (warm == 0).all(), "plan(...) changed the warm start; work on a copy"
    assert plan.elite_std.shape == shape, f"elite_std is {list(plan.elite_std.shape)}: expected [B, H, A] = {list(shape)}"
    assert torch.isfinite(plan.actions).all() and plan.actions.abs().max() <= 1, "actions leave [-1, 1], or are not finite; clamp them"
    assert plan.cost.shape == (problems,), f"cost is {list(plan.cost.shape)}: expected [B] = [{problems}]"
    again = cost(plan.actions[:, None])[:, 0]
    assert torch.allclose(plan.cost, again, atol=1e-6), f"cost says {plan.cost.tolist()}, the actions cost {again.tolist()}; return what would run"
    start = cost(warm[:, None])[:, 0]
    assert (plan.cost <= start + 1e-6).all(), f"plans cost {plan.cost.tolist()}, the warm start {start.tolist()}; keep it where it is better"
    same = planner.plan(cost, warm, torch.Generator().manual_seed(0))
    assert torch.equal(same.actions, plan.actions), "the same generator gives another plan; draw from the generator that is given, and from it alone"
    assert torch.equal(before, torch.get_rng_state()), "the global generator was drawn from; draw from the one that is given"

    def poisoned(actions: Tensor) -> Tensor:
        return torch.where(actions[:, :, 0, 0] > 0, torch.nan, cost(actions))

    held = planner.plan(poisoned, warm - 0.5, torch.Generator().manual_seed(0))
    assert torch.isfinite(poisoned(held.actions[:, None])).all(), "a plan whose cost is NaN won; NaN counts as the worst"


def check_gate(gate: Gate, futures: int = 4, horizon: int = 2, patches: int = 6, features: int = 8, action_dim: int = 4) -> None:
    """A gate gives a Verdict with a reason, the same for the same, changes nothing, and refuses what is not finite."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    plan = Plan(draw(1, horizon, action_dim).clamp(-1, 1), torch.zeros(1), torch.zeros(1, horizon, action_dim))
    imagined = Features(draw(futures, horizon, patches, features), draw(futures, horizon, 7))
    now = Features(draw(patches, features), draw(7))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    seen = Seen(now, now, pixels)
    kept = imagined.patches.clone(), plan.actions.clone()
    verdict = gate.judge(plan, imagined, seen)
    assert isinstance(verdict, Verdict), f"judge(...) returned {type(verdict).__name__}: expected planners.interface.Verdict"
    assert isinstance(verdict.go, bool), f"go is {verdict.go!r}: expected True or False"
    assert isinstance(verdict.why, str) and verdict.why, "why is empty; say in a sentence what decided"
    assert verdict.go == (verdict.score <= verdict.limit), f"go is {verdict.go} with score {verdict.score} and limit {verdict.limit}"
    assert verdict.risk is None or verdict.risk >= 0, f"risk is {verdict.risk}: expected at least 0, or None where the score tells it"
    assert torch.equal(kept[0], imagined.patches) and torch.equal(kept[1], plan.actions), "judge(...) changed what it was given"
    assert gate.judge(plan, imagined, seen) == verdict, "the same plan gets another verdict; keep nothing between calls"
    broken = Features(torch.full_like(imagined.patches, torch.nan), imagined.proprio)
    assert not gate.judge(plan, broken, seen).go, "futures of NaN were let go; refuse what is not finite"
    mad = replace(plan, actions=torch.full_like(plan.actions, torch.nan))
    assert not gate.judge(mad, imagined, seen).go, "actions of NaN were let go; refuse what is not finite"
    blind = replace(seen, now=Features(torch.full_like(now.patches, torch.inf), now.proprio))
    assert not gate.judge(plan, imagined, blind).go, "an observation of infinity was let go; refuse what is not finite"
