"""From observations to actions: context window, warm start, sub-goals, replanning, gate.

    agent = Agent(model, SamplingPlanner(), GoalEnergy)
    obs, info = env.reset(seed=0)
    agent.reset(info["goal"])
    obs, *_ = env.step(agent.act(obs))
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from planners.course import Course, CourseConfig, at_least
from planners.gate import spread
from planners.imagine import imagine, look_ahead
from planners.interface import Cost, Gate, OpenGate, Plan, Planner, Seen, Verdict
from planners.past import Past, checked
from worldmodel.interface import Context, Energy, Features, Hazard, Obs, Suggestion, WorldModel


IDLE = 0.15  # of an action: a detour that moves less at first leads nowhere
SMALLER = 0.5, 0.25  # of a refused plan's motion, in this order, the gripper as planned


@dataclass(frozen=True)
class AgentConfig(CourseConfig):
    """How an agent looks ahead and moves on. Raises ValueError for values that make no sense."""

    replan: int = 1  # actions of a plan that are run before the next one is made
    samples_z: int = 0  # sampled futures of each candidate, whose mean energy is its cost; 0: the one of the prior's mean
    looks: int = 8  # sampled futures of the chosen plan, for `Decision.imagined`, its spread and the gate
    chunk: int = 512  # futures imagined at once; bounds memory
    risk_weight: float = 0.2  # of the probability that a step goes wrong, in the cost, where the agent has a hazard
    caution: float = 10.0  # the same of the plan that is made when the gate has refused one
    readings: int = 5  # last pictures by whose readings of proprioception, which is known, those of goals are mended
    retreat: tuple[float, ...] = ()  # action [A] that is asked about where the gate has refused all others; (): none
    worry: float = 0.1  # risk of a verdict, or share of its limit, from which on it goes by the model's detour, if there is one, to the episode's end
    refusals: int = 10  # in a row, none of them answered by anything that may run, at the last of which it hands over

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, replan=1, samples_z=0, looks=1, chunk=1, risk_weight=0, caution=0, readings=0, worry=0, refusals=1)
        if self.replan > self.horizon:
            raise ValueError(f"replan is {self.replan} with horizon {self.horizon}: expected at most as many steps")


@dataclass(frozen=True)
class Decision:
    """What an agent decided at a step, and what it expects."""

    action: np.ndarray  # float32 [A], what it did
    plan: Plan  # made at this step, or with `replan` up to replan - 1 steps ago
    imagined: Features  # under the plan, for K sampled z: patches [K, H, P, D], proprio [K, H, S]
    energies: Tensor  # [K] of these futures
    energy: float  # their mean
    spread: float  # standard deviation over z of the last imagined patches, meaned; 0 for a single future
    observed: float  # energy of the observation itself to the sub-goal
    subgoal: int  # index of the sub-goal it pursues
    verdict: Verdict
    seconds: float  # that this step's decision took
    later: Sequence[np.ndarray] = ()  # what its plan has left after the action, each float32 [A]
    asked: tuple[np.ndarray, Verdict] | None = None  # the first plan's action [A], and what the gate said of it; None: none made
    answer: str = "plan"  # to the gate: plan; detour, where that came near a limit; or a cautious plan, smaller step, retreat, hold, hand over


class _Refusing:
    """Lets nothing go, so that all answers to that are tried."""

    def judge(self, plan: Plan, imagined: Features, seen: Seen) -> Verdict:
        return Verdict(False, 1.0, 0.0, "a rehearsal")


class Agent:
    """Acts towards a goal picture, or through sub-goal pictures, in a plain Gymnasium loop.

    `energy` makes the energy of a goal's features: patches [1, P, D], proprio [1, S] or None. Once a plan's hazard comes so near the
    gate's limit as `config.worry` says, or a plan is refused, it goes by `model.detour`, if there is one, to the episode's end, without a search. Where
    that leads nowhere a refused plan is followed by a more cautious one. Then come a smaller step, `config.retreat`, and
    `fallback` [A] (zeros without), and after some of those in a row it hands over, which `last.answer` says. With `hazard` and
    `config.risk_weight` it avoids steps that are likely to go wrong. Where it is stuck, `planner.eager` plans, if there is one, and
    where it is cautious `planner.cautious`.
    If there is `model.suggest`, a search begins with the actions that it suggests, but for `planner.choices` where it does not
    choose those, and looks for its waypoint; what a plan promises is told by the goal itself.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        energy: Callable[[Features], Energy],
        config: AgentConfig = AgentConfig(),
        gate: Gate = OpenGate(),
        fallback: np.ndarray | None = None,
        hazard: Hazard | None = None,
    ) -> None:
        self.model, self.planner, self.energy, self.config, self.gate = model, planner, energy, config, gate
        self.hazard = hazard
        self.fallback = np.zeros(model.action_dim, np.float32) if fallback is None else np.array(fallback, np.float32)
        if len(config.retreat) not in (0, model.action_dim):
            raise ValueError(f"retreat is {config.retreat}: expected an action of {model.action_dim} numbers, or ()")
        if self.fallback.shape != (model.action_dim,):
            raise ValueError(f"expected a fallback action [{model.action_dim}], got {list(self.fallback.shape)}")
        self.last: Decision | None = None
        self._past: Past | None = None

    def reset(self, goal: Obs | Sequence[Obs], seed: int = 0) -> None:
        """Start an episode towards a goal, or through sub-goals of which the last is the goal.

        A goal is {"pixels": uint8 [h, w, 3]}, and "proprio" float32 [S] where it is known. Raises ValueError for anything else,
        and leaves the episode that there was as it is.
        """
        if not hasattr(goal, "keys") and not hasattr(goal, "__len__"):
            raise ValueError(f"expected a goal or a list of sub-goals, got {type(goal).__name__}; pass info['goal']")
        goals = [goal] if hasattr(goal, "keys") else list(goal)
        if not goals:
            raise ValueError("expected a goal or a list of sub-goals, got an empty list; pass info['goal']")
        shape = checked(goals[0], "goal", None)["pixels"].shape
        goals = [checked(g, "goal", shape) for g in goals]
        wanted, course = [self.model.encode(g) for g in goals], Course(self.config, len(goals))
        generator = torch.Generator().manual_seed(int(seed))
        self._pursue(wanted, ["proprio" in g for g in goals], None)
        self._shape, self._course, self._generator = shape, course, generator
        self._past = Past(self.model, self.config.readings)
        self._answer = self.fallback  # what runs until the next observation
        self._expected, self._holds, self._age, self._wary = None, 0, 0, False
        self.last = None

    def rehearse(self, obs: Obs) -> None:
        """Decide as if an observation were an episode's first one and its goal, under a gate that refuses all, and forget it.

        What models and planners make ready when it is first needed, as to compile, which takes seconds, is ready then: for a robot
        that does not wait, before it moves. The present episode stays as it is, if model and planner remember nothing of one. Raises as
        `reset` and `act` do.
        """
        other = copy.copy(self)
        other.gate = _Refusing()
        for under_way in ((), (self.fallback,)):
            other.reset(obs)
            other.act(obs, under_way=under_way)

    @torch.no_grad()
    def act(self, obs: Obs, ran: np.ndarray | None = None, under_way: Sequence[np.ndarray] = ()) -> np.ndarray:
        """The action float32 [A] for an observation {"pixels": uint8 [h, w, 3], "proprio": float32 [S]}.

        `last` tells how it came about. A robot that does not wait says what `ran` since the last observation, where that is
        not what was answered then, and which actions, each [A], are `under_way`, to end before this one begins: it is planned
        for where they will have led. Raises RuntimeError before `reset`, ValueError for an observation of another shape
        than the goal or with NaN, and where nothing that the model imagines has a finite energy, and no gate refuses it.
        """
        start = time.perf_counter()
        under_way = [self._action(action, "action under way") for action in under_way]
        self._take_in(obs, ran)
        if self.last is not None and self.last.answer == "hand over":  # until reset
            self.last = replace(self.last, asked=None, seconds=time.perf_counter() - start)
            return self.fallback.copy()
        context = self._past.context(under_way)
        observed = self._observe(context)
        decision = None if self._is_new() or not self.last.verdict.go else self._kept(context, observed)
        if decision is None:
            decision = self._decide(context, observed, self._course.look())
            self._course.promise(decision.energy)
        self._holds = 0 if decision.verdict.go else self._holds + 1
        action, *later = _told(decision.plan.actions[0, self._age :])
        self.last = replace(decision, action=action, later=later, seconds=time.perf_counter() - start)
        self._answer = action.copy()
        after = decision.imagined._replace(patches=decision.imagined.patches[:, self._age], proprio=None)
        self._expected = None if under_way else after
        self._age += 1
        self._course.step(decision.verdict.go)
        return action.copy()

    @torch.no_grad()
    def watch(self, obs: Obs, ran: np.ndarray | None = None) -> None:
        """Take in an observation, and the action that `ran` before it, without a decision. Raises as `act` does."""
        self._take_in(obs, ran)
        self._observe(self._past.context())
        self._expected = None  # was of this observation, and the gate is asked about the next one
        self._age += 1  # a step of the plan has passed
        self._course.step(self._holds == 0)

    def _take_in(self, obs: Obs, ran: np.ndarray | None) -> None:
        if self._past is None:
            raise RuntimeError("the agent has no goal yet: call reset(info['goal']) before act(obs)")
        seen = checked(obs, "observation", self._shape)
        ran = self._answer if ran is None else self._action(ran, "action that ran")
        if not np.array_equal(ran, self._answer):
            self._expected = None
        self._past.take_in(seen, ran)
        off = None if all(self._known) else self._past.off
        if off is not None:
            self._pursue(self._wanted, self._known, off)

    def _action(self, action: np.ndarray, what: str) -> np.ndarray:
        """An action float32 [A] from outside; raises ValueError where it is none."""
        action = np.array(action, np.float32)
        if action.shape != (self.model.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"expected an {what} of {self.model.action_dim} finite numbers, got {action}; give what the robot was told")
        return action

    def _observe(self, context: Context) -> float:
        """Pass on to the next sub-goal where it is time; the present energy to the one pursued then."""
        return self._course.observe(lambda subgoal: self._observed(context, subgoal), moved=self._holds == 0)

    def _kept(self, context: Context, observed: float) -> Decision | None:
        """The last decision, where a step of its plan is left and the gate lets it go on; else None."""
        last, age = self.last, self._age
        if age >= min(self.config.replan, last.plan.actions.shape[1]):
            return None
        rest = replace(last.plan, actions=last.plan.actions[:, age:])
        verdict = self.gate.judge(rest, last.imagined.map(lambda x: x[:, age:]), self._seen(context))
        asked = _told(rest.actions[0])[0], verdict
        return replace(last, observed=observed, verdict=verdict, asked=asked, answer="plan") if verdict.go else None

    def _seen(self, context: Context) -> Seen:
        """What the gate may know besides the plan."""
        past = self._past
        return Seen(past.now, self._pursued[self._course.subgoal], past.pixels, self._expected, past.still, context, past.views, past.unlike)

    def _pursue(self, goals: list[Features], known: list[bool], off: Tensor | None) -> None:
        """Pursue goals, of which some have proprioception that was only read off a picture, and is mended here.

        What a reading is off [S] now, where the truth is known, it is off there too: the camera is not quite where it was.
        """
        pursued = [
            goal if sure or goal.proprio is None or off is None else goal._replace(proprio=goal.proprio + off) for goal, sure in zip(goals, known)
        ]
        energies = [self.energy(_with_axes(goal, 1)) for goal in pursued]
        self._wanted, self._known, self._pursued, self._energies = goals, known, pursued, energies

    def _is_new(self) -> bool:
        """Whether there is no plan yet for the present sub-goal."""
        return self.last is None or self.last.subgoal != self._course.subgoal

    def _observed(self, context: Context, subgoal: int) -> float:
        """Energy of the last frame to a sub-goal."""
        seen = context.features.map(lambda x: x[:, None, None, -1:])  # [1, 1, 1, 1, P, D]
        still = seen.patches.new_zeros(1, 1, 1, self.model.action_dim)
        return float(self._energies[subgoal](seen, still))

    def _decide(self, context: Context, observed: float, horizon: int) -> Decision:
        """Make a new plan, imagine it under several z, and have the gate judge it; where it refuses, try what is safer."""
        config, generator = self.config, self._generator
        detour = self._detour(context, horizon) if self._wary else None
        suggested = detour or self._way("suggest", context, horizon)
        cost = self._cost(context, horizon, suggested, config.risk_weight, config.samples_z)

        def as_told(actions: Tensor) -> Plan:
            """A plan of actions [A] or [1, H, A] as they are."""
            actions = actions.to(start).expand_as(start)
            return Plan(actions, cost(actions[:, None])[:, 0], torch.zeros_like(actions))

        start = self._warm_start(suggested, horizon)
        planner = getattr(self.planner, "eager", self.planner) if self._course.stuck else self.planner
        plan = planner.plan(cost, start, generator) if detour is None else as_told(detour.actions[None])
        sound = bool(torch.isfinite(plan.actions).all() and torch.isfinite(plan.cost).all())
        plan = plan if sound else as_told(torch.from_numpy(self.fallback))
        self._age = 0
        decision = self._judged(plan, context, observed, "plan")
        if not sound and decision.verdict.go:
            raise ValueError(f"the best plan costs {plan.cost.tolist()}: expected a number; the model imagines NaN or infinity")
        asked = _told(plan.actions[0])[0], decision.verdict
        if not self._wary and decision.verdict.worries(config.worry):
            detour = self._detour(context, horizon)
            self._wary = detour is not None
            if detour is not None:
                safer = self._judged(as_told(detour.actions[None]), context, observed, "detour")
                if not decision.verdict.go or safer.verdict.go and safer.verdict.danger < decision.verdict.danger:
                    decision, plan = safer, safer.plan
        if not decision.verdict.go and detour is None and self.hazard is not None:
            planner = getattr(self.planner, "cautious", self.planner)
            samples = max(config.samples_z, config.looks if config.looks > 1 else 0)  # the worse half of the futures counts
            cautious = planner.plan(self._cost(context, horizon, suggested, config.caution, samples), start, generator)
            decision = self._judged(cautious, context, observed, "cautious plan")

        gripper = list(getattr(self.planner, "choices", ()))
        for share in SMALLER:
            if not decision.verdict.go:
                smaller = plan.actions * share
                smaller[..., gripper] = plan.actions[..., gripper]
                decision = self._judged(as_told(smaller), context, observed, "smaller step")
        if not decision.verdict.go and config.retreat:
            decision = self._judged(as_told(torch.tensor(config.retreat)), context, observed, "retreat")
        if not decision.verdict.go:  # what runs is the fallback, and what is expected is what follows from that
            answer = "hand over" if self._holds + 1 >= config.refusals else "hold"
            held = self._judged(as_told(torch.from_numpy(self.fallback)), context, observed, answer)
            decision = replace(held, verdict=decision.verdict)
        return replace(decision, asked=asked)

    def _way(self, which: str, context: Context, horizon: int) -> Suggestion | None:
        """What the model says of the way to the goals ahead, if it says anything, in numbers: `suggest`, or `detour` of a safer one."""
        if not hasattr(self.model, which):
            return None
        now = context.features.map(lambda x: x[0, -1])
        way = getattr(self.model, which)(now, self._pursued[self._course.subgoal :], horizon)
        return way if way is not None and torch.isfinite(way.actions).all() else None

    def _detour(self, context: Context, horizon: int) -> Suggestion | None:
        """A safer way, if the model says one, and it leads anywhere."""
        way = self._way("detour", context, horizon)
        return None if way is None or bool((way.actions[0].abs() < IDLE).all()) else way

    def _cost(self, context: Context, horizon: int, suggested: Suggestion | None, risk_weight: float, samples_z: int) -> Cost:
        """Of plans to the sub-goal, or to what lies on the way to it."""
        config, energy = self.config, self._energies[self._course.subgoal]
        if suggested is not None:
            energy = self.energy(_with_axes(suggested.waypoint, 1))
        return imagine(
            self.model, context, energy, horizon, self._generator, samples_z, config.chunk, self.hazard, risk_weight
        )

    def _judged(self, plan: Plan, context: Context, observed: float, answer: str) -> Decision:
        """A plan with the futures that are imagined of it, and the gate's verdict."""
        looks, energy = self.config.looks, self._energies[self._course.subgoal]
        z = self.model.sample_z((1, 1, looks, plan.actions.shape[1]), self._generator if looks > 1 else None)
        imagined, energies = look_ahead(self.model, context, energy, plan.actions[:, None], z)
        futures = imagined.map(lambda x: x[0, 0])
        doubt = spread(futures.patches[:, -1:])
        verdict, mean = self.gate.judge(plan, futures, self._seen(context)), float(energies.mean())
        return Decision(
            self.fallback, plan, futures, energies[0, 0], mean, doubt, observed, self._course.subgoal, verdict, 0.0, answer=answer
        )

    def _warm_start(self, suggested: Suggestion | None, horizon: int) -> Tensor:
        """What the model suggests, else what is left of the last plan for the same sub-goal, and zeros after it: [1, H, A]."""
        if suggested is not None:
            start = suggested.actions[None].clone()
            if not suggested.chooses:  # not what leads there: when matters
                start[..., list(getattr(self.planner, "choices", ()))] = 0.0
            return start
        start = torch.zeros(1, horizon, self.model.action_dim, device=self._past.now.patches.device)
        if not self._is_new():
            left = self.last.plan.actions[:, self._age : self._age + horizon]
            start[:, : left.shape[1]] = left
        return start


def _with_axes(features: Features, axes: int) -> Features:
    """Features with leading axes of size 1."""
    return features.map(lambda x: x.reshape((1,) * axes + x.shape))


def _told(actions: Tensor) -> list[np.ndarray]:
    """What a robot is told of actions [H, A]: each float32 [A], in [-1, 1]."""
    return list(np.clip(actions.numpy(force=True), -1, 1).astype(np.float32))
