"""Who acts in a benchmark besides an agent that waits: one in real time, one whose gate refuses by chance, a policy alone."""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from planners.agent import Agent
from planners.interface import Plan, Seen, Verdict
from worldmodel import model
from worldmodel.interface import Features

SLOWEST_OF = 3  # decisions, by which the next one is planned to begin


class Paced:
    """An agent in a world that does not wait: every `period` seconds an action begins, whether it has decided or not.

    A decision starts from the picture at a step's beginning. It is planned to begin as many steps later as the slowest of the last
    few took, but no later than the plan before it ends, and begins then, or where it takes longer, as soon as it is there; sooner it
    would run from where it was not planned for. Until then the last decision's actions run, as many as its plan has, then the
    fallback. The clock is the decisions' own, as measured; the simulator's time does not count.
    """

    def __init__(self, agent: Agent, period: float) -> None:
        self.agent, self.period = agent, period
        self.decides = False  # whether a decision was made at the present step
        self.late = False  # whether none began there that was to
        self.begins = 1  # steps from the last decision's picture until its first action
        self._queue: list[np.ndarray] = []  # actions to run from the present step on
        self._decided: list[np.ndarray] = []  # what will be the queue
        self._due, self._wait = 0, 0  # steps until then: as planned, and as long as it takes
        self._took: deque[int] = deque([1], maxlen=SLOWEST_OF)  # steps
        self._ran: np.ndarray | None = None

    def __call__(self, obs: dict) -> np.ndarray:
        """The action [A] of the step that begins with an observation."""
        self._due, self._wait = self._due - 1, self._wait - 1
        self.decides = max(self._due, self._wait) <= 0
        self.late = self._due <= 0 < self._wait
        if self.decides:
            self._queue = self._decided
        action = self._queue.pop(0) if self._queue else self.agent.fallback
        if self.decides:
            self._due = min(max(self._took), 1 + len(self._queue))
            first = self.agent.act(obs, self._ran, [action, *self._queue[: self._due - 1]])
            self._decided = [first, *self.agent.last.later]
            self._wait = max(1, math.ceil(self.agent.last.seconds / self.period))
            self._took.append(self._wait)
            self.begins = max(self._due, self._wait)
        else:
            self.agent.watch(obs, self._ran)
        self._ran = action
        return action


@dataclass(frozen=True)
class RandomGate:
    """Refuses by chance, as often as it is told: whatever is planned in the same decision, or nothing.

    What was expected of a picture tells decisions apart whose pictures are the same, as while a hand holds still: its z are new.
    """

    rate: float
    seed: int

    def judge(self, plan: Plan, imagined: Features, seen: Seen) -> Verdict:
        """Go, or not."""
        known = seen.pixels.tobytes() + (b"" if seen.expected is None else seen.expected.patches.numpy(force=True).tobytes())
        drawn = float(np.random.default_rng((self.seed, zlib.crc32(known))).random())
        return Verdict(drawn >= self.rate, self.rate - drawn, 0.0, "by chance")


@dataclass(frozen=True)
class Imitated:
    """What an Imitator has decided."""

    subgoal: int
    seconds: float
    observed: float | None = None  # it knows no energy


class Imitator:
    """Lets a model's policy act alone from goal picture to goal picture, by their step budgets alone.

    An Agent also moves on early, and back to the first one, by an energy, which these policies have not. It makes the likeliest choice, as
    a search begins with, or `draws` one. At a share `stray` of its steps it does something else.
    """

    def __init__(self, world: model.LatentModel, subgoal_steps: tuple[int, ...], *, draws: bool = False, stray: float = 0.0) -> None:
        self.model, self._steps, self._draws, self._stray = world, subgoal_steps, draws, stray
        self.last: Imitated | None = None

    def reset(self, goals: list[dict], seed: int) -> None:
        """Start an episode towards pictures, of which the last is the goal. ValueError where these are not so many."""
        if len(goals) > 1 and len(self._steps) != len(goals):
            raise ValueError(f"subgoal_steps has {len(self._steps)} entries for {len(goals)} sub-goals; expected one for each")
        self._goals = [self.model.encode(goal).patches for goal in goals]
        self._generator, self._rng = torch.Generator().manual_seed(seed), np.random.default_rng((seed, 2))
        self._step = 0

    def act(self, obs: dict) -> np.ndarray:
        """An action [A]."""
        start = time.perf_counter()
        subgoal = min(int((np.cumsum(self._steps) <= self._step).sum()), len(self._goals) - 1)
        now = Features(*(x[None] for x in self.model.encode(obs)))
        action = self.model.policy.choose(now, self._goals[subgoal][None], self._generator if self._draws else None)[0].numpy()
        if self._stray and self._rng.random() < self._stray:
            action = strayed(action, self._rng)
        self._step += 1
        self.last = Imitated(subgoal, time.perf_counter() - start)
        return action


def strayed(action: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What else might be done in place of an action [A]: as a rule less of its motion, else some more besides, or a way up.

    So do a gate's answers to a plan, and plans that are searched around a policy's.
    """
    kind, other = rng.random(), action.copy()
    if kind < 0.6:
        other[:-1] *= rng.random()
    elif kind < 0.8:
        other[:-1] += rng.normal(0.0, 0.3, len(action) - 1)
    else:
        other[:] = 0.0
        if len(action) > 3:
            other[2] = 0.5
    return other.clip(-1, 1)
