"""Sampling planners: one refinement loop; CEM, iCEM and MPPI differ in their noise and in their weights only.

CEM: Rubinstein and Kroese, The Cross-Entropy Method (2004). iCEM: Pinneri et al., arXiv 2008.06389 (coloured noise, elites
kept). MPPI: Williams et al., arXiv 1509.01149, with the spread refined as in TD-MPC2 (arXiv 2310.16828).

A gripper's action is a choice rather than an amount: the mean of "open" and "close" is neither. Its dimensions are drawn from
a categorical distribution over close (-1), hold (0) and open (+1), refined by cross-entropy like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from planners.interface import Cost, Plan

CHOICES = 3  # close, hold, open: -1, 0, +1


@dataclass(frozen=True)
class SamplingConfig:
    """How a sampling planner searches. Raises ValueError for values that make no sense."""

    method: Literal["cem", "icem", "mppi"] = "cem"
    samples: int = 40  # candidates per iteration
    iterations: int = 3
    elites: int = 8  # best candidates that the next iteration is drawn around
    std: float | tuple[float, ...] = 0.6  # of the first iteration's noise; one number, or one for each action dimension
    min_std: float = 0.05  # the noise never gets smaller
    fine: float = 1.0  # noise of a candidate is scaled by a factor from here to 1, log-uniform: some look far, some close
    momentum: float = 0.1  # share of the old mean, spread and choice in the new one
    momentum_std: float | tuple[float, ...] | None = None  # the spread's own, one or one for each dimension; None: the same
    ball: float = 0.0  # L1 radius that the first three entries, a translation, stay within; 0: the bounds alone
    gripper: Literal["categorical", "gaussian"] = "categorical"
    gripper_dims: tuple[int, ...] = (-1,)  # action dimensions that are a choice of -1, 0, +1
    hold: float = 0.6  # probability of the warm start's choice in the first iteration's
    margin: float = 0.2  # share of its cost that a plan must gain by moving the gripper otherwise than the warm start has it:
    # what an opening that is nearer to the goal's gains by itself stays below it, a grasp or a release above
    eager_margin: float = 0.1  # the same of an eager planner, for where there is no progress by moving the hand
    smoothing: float = 0.15  # share of the uniform distribution in that of a choice, so that none dies out
    colour: float = 2.0  # iCEM: exponent of the noise's spectrum over the horizon; 0 is white
    keep: float = 0.3  # iCEM: share of the elites that stay candidates
    temperature: float = 0.5  # MPPI: of the elites' weights, in root mean squares of what they cost more than the best

    def __post_init__(self) -> None:
        for name, known in (("method", ("cem", "icem", "mppi")), ("gripper", ("categorical", "gaussian"))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        for name in ("samples", "iterations", "elites"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.elites > self.samples:
            raise ValueError(f"elites is {self.elites} of {self.samples} samples: expected at most as many")
        for name in ("momentum", "smoothing", "keep", "hold", "margin", "eager_margin"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more, and less than 1")
        momenta = self.momentum_std if isinstance(self.momentum_std, tuple) else (self.momentum_std or 0.0,)
        if not momenta or not all(0 <= momentum < 1 for momentum in momenta) or not self.ball >= 0:
            raise ValueError(
                f"momentum_std is {self.momentum_std} and ball {self.ball}: expected 0 or more, and less than 1 of momentum_std"
            )
        if not 0 < self.fine <= 1:
            raise ValueError(f"fine is {self.fine}: expected more than 0, and at most 1")
        stds = self.std if isinstance(self.std, tuple) else (self.std,)
        if not stds or not all(value > 0 for value in (*stds, self.min_std, self.temperature)):
            raise ValueError(f"std {self.std}, min_std {self.min_std}, temperature {self.temperature}: expected more than 0")


GUIDED = SamplingConfig(samples=24, iterations=1, elites=4, std=0.3, fine=0.1)
"""For a model that suggests the way: around that, few candidates do, some of them close."""
VJEPA2_AC = SamplingConfig(
    samples=800, iterations=10, elites=10, std=1.0, min_std=1e-3, momentum=0.0, ball=1.0, gripper="gaussian"
)
"""How V-JEPA 2-AC is planned with (arXiv 2506.09985, section 3.2): horizon 1, translations within an L1 ball, of 7.5 cm
where an action of 1 is that much. 16 s per action on an RTX 4090, they say."""
VJEPA2_AC_RELEASED = replace(
    VJEPA2_AC, ball=0.0, std=(1.0,) * 6 + (4 / 3,), momentum=0.15, momentum_std=(0.75,) * 6 + (0.15,)
)
"""The same as Meta's released example does it: each axis within the bounds instead of a ball, the spread kept longer, and
the gripper's noise is 1 of closedness where an action of 1 is 0.75."""


@dataclass(frozen=True)
class Proposal:
    """What candidates are drawn from, independently for each problem."""

    mean: Tensor  # [B, H, A]
    std: Tensor  # [B, H, A]
    choice: Tensor  # [B, H, G, CHOICES] probabilities, for the G gripper dimensions


@dataclass(frozen=True)
class SamplingPlanner:
    """The refinement loop. The result is never worse than the warm start, and was evaluated as it is."""

    config: SamplingConfig = SamplingConfig()

    @property
    def choices(self) -> tuple[int, ...]:
        """Action dimensions that are a choice."""
        return tuple(_choices(self.config))

    @property
    def eager(self) -> SamplingPlanner:
        """The same, but content with a smaller gain by the gripper."""
        return replace(self, config=replace(self.config, margin=min(self.config.margin, self.config.eager_margin)))

    @property
    def cautious(self) -> SamplingPlanner:
        """The same, but one that searches at least as long as by default; no further off, where what a gate goes by is known less."""
        config, least = self.config, SamplingConfig()
        more = {name: max(getattr(config, name), getattr(least, name)) for name in ("samples", "iterations", "elites")}
        return replace(self, config=replace(config, **more))

    @torch.no_grad()
    def plan(self, cost: Cost, warm_start: Tensor, generator: torch.Generator) -> Plan:
        """Improve on warm_start [B, H, A].

        Candidate 0 of the first iteration is the warm start, later the best so far. Raises ValueError for a warm start or
        costs of another shape, or a warm start that is not finite.
        """
        config = self.config
        nominal = _bounded(_checked(warm_start, config), config)
        proposal = _first(nominal, config)
        kept, best, best_cost = nominal[:, None], nominal, nominal.new_full(nominal.shape[:1], torch.inf)
        for _ in range(config.iterations):
            fresh = _draw(proposal, config.samples - kept.shape[1], config, generator)
            candidates = torch.cat([kept, fresh], 1)  # [B, N, H, A]
            costs = _evaluate(cost, candidates)
            elite_costs, index = costs.sort(dim=1, stable=True)
            elite_costs, index = elite_costs[:, : config.elites], index[:, : config.elites]
            elites = candidates.gather(1, index[:, :, None, None].expand(-1, -1, *nominal.shape[1:]))
            better = elite_costs[:, 0] < best_cost
            best = torch.where(better[:, None, None], elites[:, 0], best)
            best_cost = torch.where(better, elite_costs[:, 0], best_cost)
            proposal = _refined(proposal, elites, _weights(elite_costs, config), config)
            kept = torch.cat([best[:, None], elites[:, 1 : _kept(config)]], 1)
        actions, value = _settle(cost, nominal, best, _centre(proposal, config), config)
        return Plan(actions, value, elites.std(1, correction=0))


def _checked(warm_start: Tensor, config: SamplingConfig) -> Tensor:
    if warm_start.dim() != 3:
        raise ValueError(f"expected a warm start [B, H, A], got {list(warm_start.shape)}; give zeros of that shape")
    if not torch.isfinite(warm_start).all():
        raise ValueError("the warm start holds NaN or infinity; expected numbers in [-1, 1]")
    dims = warm_start.shape[-1]
    for name in ("std", "momentum_std"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != dims:
            raise ValueError(f"{name} has {len(value)} entries, expected 1 or one for each of {dims} action dimensions")
    if config.gripper == "categorical" and any(not -dims <= dim < dims for dim in config.gripper_dims):
        raise ValueError(f"gripper_dims is {config.gripper_dims}, expected dimensions of an action of {dims}")
    return warm_start.detach().float()


def _bounded(actions: Tensor, config: SamplingConfig) -> Tensor:
    """Actions [..., A] brought into the bounds, and the translation into its ball."""
    actions = actions.clamp(-1, 1)
    if config.ball:
        size = actions[..., :3].abs().sum(-1, keepdim=True)
        actions = torch.cat((actions[..., :3] * (config.ball / size.clamp_min(1e-12)).clamp_max(1), actions[..., 3:]), -1)
    return actions


def _choices(config: SamplingConfig) -> list[int]:
    """Action dimensions that are a choice."""
    return list(config.gripper_dims) if config.gripper == "categorical" else []


def _kept(config: SamplingConfig) -> int:
    """How many candidates stay from one iteration to the next; the best one always does."""
    kept = round(config.keep * config.elites) if config.method == "icem" else 1
    return max(1, min(kept, config.samples - 1))


def _first(nominal: Tensor, config: SamplingConfig) -> Proposal:
    std = torch.tensor(config.std, dtype=nominal.dtype, device=nominal.device).expand_as(nominal)
    told = torch.nn.functional.one_hot(nominal[..., _choices(config)].round().long() + 1, CHOICES).to(nominal)
    move = (1 - config.hold) / (CHOICES - 1)
    return Proposal(nominal, std, move + (config.hold - move) * told)


def _draw(proposal: Proposal, count: int, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Candidates [B, count, H, A] inside the bounds."""
    b, horizon, dims = proposal.mean.shape
    colour = config.colour if config.method == "icem" else 0.0
    noise = _noise((b, count, dims, horizon), colour, generator).to(proposal.mean).transpose(2, 3)
    if config.fine < 1:
        uniform = torch.rand((b, count, 1, 1), generator=generator, device=generator.device)
        noise = noise * (config.fine**uniform).to(noise)
    actions = _bounded(proposal.mean[:, None] + proposal.std[:, None] * noise, config)
    if chosen := _choices(config):
        uniform = torch.rand((b, count, horizon, len(chosen), 1), generator=generator, device=generator.device)
        below = proposal.choice.cumsum(-1)[:, None, ..., : CHOICES - 1]
        actions[..., chosen] = (uniform.to(below) >= below).sum(-1).to(actions) - 1
    return actions


def _noise(shape: tuple[int, ...], colour: float, generator: torch.Generator) -> Tensor:
    """Normal noise of unit variance whose spectrum over the last axis falls as frequency ** -colour.

    Timmer and König, On generating power law noise (1995).
    """
    n = shape[-1]
    if colour == 0 or n == 1 or 0 in shape:  # of nothing there is no transform
        return torch.randn(shape, generator=generator, device=generator.device)
    frequency = torch.fft.rfftfreq(n).clamp_min(1 / n)
    scale = frequency ** (-colour / 2)
    power = 4 * scale.square()  # of x_t = 1/n sum over positive and negative frequencies
    power[0] /= 4
    if n % 2 == 0:
        power[-1] /= 4
    white = torch.randn((*shape[:-1], len(scale), 2), generator=generator, device=generator.device)
    spectrum = torch.view_as_complex(white) * (scale * n / power.sum().sqrt()).to(white)
    return torch.fft.irfft(spectrum, n)


def _evaluate(cost: Cost, candidates: Tensor) -> Tensor:
    """Costs [B, N], infinite where they are NaN."""
    costs = cost(candidates)
    if costs.shape != candidates.shape[:2]:
        raise ValueError(f"the cost of candidates {list(candidates.shape)} is {list(costs.shape)}, expected [B, N]")
    return torch.where(torch.isnan(costs), torch.inf, costs.to(candidates))


def _weights(costs: Tensor, config: SamplingConfig) -> Tensor:
    """Weights [B, E] of elites with ascending costs [B, E]: equal ones, or MPPI's; 0 for infinite costs."""
    finite = torch.isfinite(costs)
    weights = finite.to(costs)
    if config.method == "mppi":
        excess = torch.where(finite, costs - costs[:, :1], 0.0)
        spread = (excess.square().sum(1) / weights.sum(1).clamp_min(1)).sqrt().clamp_min(1e-12)
        weights = weights * torch.exp(-excess / (config.temperature * spread[:, None]))
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-12)


def _refined(old: Proposal, elites: Tensor, weights: Tensor, config: SamplingConfig) -> Proposal:
    """The distribution that fits the weighted elites [B, E, H, A], smoothed; the old one where no elite has weight."""
    some = (weights.sum(1) > 0)[:, None, None]
    weights = weights[:, :, None, None]
    mean = (weights * elites).sum(1)
    std = (weights * (elites - mean[:, None]).square()).sum(1).sqrt().clamp_min(config.min_std)
    taken = torch.nn.functional.one_hot(elites[..., _choices(config)].round().long() + 1, CHOICES)
    choice = (weights[..., None] * taken).sum(1)
    choice = (1 - config.smoothing) * choice + config.smoothing / CHOICES
    blend = torch.where(some, 1 - config.momentum, 0.0)
    slow = config.momentum if config.momentum_std is None else torch.tensor(config.momentum_std).to(std)
    return Proposal(
        old.mean + blend * (mean - old.mean),
        old.std + torch.where(some, 1 - slow, 0.0) * (std - old.std),
        old.choice + blend[..., None] * (choice - old.choice),
    )


def _centre(proposal: Proposal, config: SamplingConfig) -> Tensor:
    """The middle of a proposal [B, H, A]: its mean, and the likeliest choices."""
    centre = proposal.mean.clone()
    if chosen := _choices(config):
        centre[..., chosen] = proposal.choice.argmax(-1).to(centre) - 1
    return _bounded(centre, config)


def _settle(cost: Cost, nominal: Tensor, best: Tensor, centre: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The plan [B, H, A] to run, of the nominal one, the best candidate and the centre of the last ones, and its cost [B].

    Without choices, the cheapest. Else the centre with the gripper moved as the nominal one has it, or otherwise where that pays:
    candidates differ by more than their gripper, whose part in the cost may be small, so the centre is compared with itself,
    without any motion of the gripper, and with one motion at each step. Of those that are equal within the margin, none is
    taken rather than a motion, and of motions the latest where it closes, for a grasp can be made up later, a wrong one often
    not be undone; and the earliest where it opens, for a hand that moves off first drops from higher. The cheapest of the
    three is taken where it is better than that by the margin, or the nominal one where it is better at all. All are
    evaluated once more, side by side.
    """
    chosen, horizon, plans = _choices(config), nominal.shape[1], [nominal, best, centre]
    if chosen:
        begun = centre.clone()
        begun[..., chosen] = nominal[..., chosen].round()
        plans += [begun, _with_gripper(centre, chosen, None, 0.0)]
        plans += [_with_gripper(centre, chosen, h, move) for move in (-1.0, 1.0) for h in range(horizon)]
    plans = torch.stack(plans, 1)
    costs, rows = _evaluate(cost, plans), torch.arange(len(plans), device=plans.device)
    value, which = costs[:, :3].min(1)
    if not chosen:
        return plans[rows, which], value
    begun, moved = costs[:, 3], costs[:, 4:]  # as the nominal plan moves the gripper; in other ways, not at all first
    least = moved.min(1, keepdim=True)[0]
    opens = moved[:, 1 + horizon :].amin(1) < moved[:, 1 : 1 + horizon].amin(1)  # [B]
    step = torch.arange(horizon, device=costs.device)  # each motion's rank among equals: closing late, opening early
    rank = torch.where(opens[:, None], torch.cat((step - horizon, horizon - step)), torch.cat((step + 1, -step - 1)))
    rank = torch.cat((rank.new_full((len(rank), 1), horizon + 1), rank), 1)  # none, rather than a motion that gains little by it
    motion = torch.where(moved <= least + config.margin * least.abs(), rank, -horizon - 1).argmax(1)
    found = moved[rows, motion]
    pays = (found < begun - config.margin * begun.abs()) | (torch.isfinite(found) & ~torch.isfinite(begun))
    single = torch.where(pays, 4 + motion, 3)
    own = costs[rows, single]
    worse = (own > costs[:, 0]) | (value < own - config.margin * own.abs()) | ~torch.isfinite(own)
    index = torch.where(worse, which, single)
    return plans[rows, index], costs[rows, index]


def _with_gripper(actions: Tensor, dims: list[int], step: int | None, move: float) -> Tensor:
    """Actions [B, H, A] with the gripper at rest but for one motion."""
    changed = actions.clone()
    changed[..., dims] = 0.0
    if step is not None:
        changed[:, step, dims] = move
    return changed
