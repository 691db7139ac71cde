"""Whose turn it is: which of an episode's sub-goals is pursued, and how far ahead one looks on the way to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

SUBGOAL_STEPS = {3: (4, 10, 4)}  # V-JEPA 2-AC: grasped, near the target, placed (arXiv 2506.09985, section 4.2)
OTHER_STEPS = 8  # for each sub-goal of any other number of them


@dataclass(frozen=True)
class CourseConfig:
    """When a sub-goal's turn is over. Raises ValueError for values that make no sense."""

    horizon: int = 2  # imagined steps, H
    countdown: bool = False  # arrive `horizon` steps after a sub-goal's start: look ahead a step less at each
    least_horizon: int = 1  # where the countdown ends
    subgoal_steps: tuple[int, ...] = ()  # steps until the next sub-goal's turn; (): 4, 10, 4 for three, else 8 each
    switch_energy: float | None = None  # of an observation to its sub-goal, at which the next one's turn comes; belongs to a model
    patience: int | None = None  # steps without progress after which it looks ahead anew, and moves on if that promises none
    progress: float = 0.005  # what counts as progress: this share of the highest energy on the way to a sub-goal
    retry: float | None = None  # share of the episode's highest energy above which a sub-goal has failed at its end: begin again
    retries: int = 3  # times, at most, in an episode

    def __post_init__(self) -> None:
        known = {"retry": 0} if self.retry is not None else {}
        at_least(self, horizon=1, least_horizon=1, retries=0, progress=0, **known)
        if min(*self.subgoal_steps, 1, self.patience or 1) < 1 or self.patience == 0:
            raise ValueError(f"subgoal_steps is {self.subgoal_steps}, patience {self.patience}: expected at least 1 each")


def at_least(config: object, **least: float) -> None:
    """Raise ValueError where a field of a config is less than it may be."""
    for name, low in least.items():
        if not getattr(config, name) >= low:  # which NaN is not
            raise ValueError(f"{name} is {getattr(config, name)}: expected at least {low}")


class Course:
    """Passes from sub-goal to sub-goal: by step budgets, by energy, or where it is stuck; back to the first where one has failed.

    `subgoal` is the index of the one that is pursued, `stuck` whether the last steps on the way to it brought no progress
    when it was looked at last. Each step: `observe`, then `look` and `promise` where a plan is made, then `step`.
    """

    def __init__(self, config: CourseConfig, count: int) -> None:
        self.config, self.subgoal = config, 0
        self._since = self._ahead = 0  # steps of this sub-goal's turn; since the countdown began
        self._retries = 0
        self._trail: list[float] = []  # observed energies to the sub-goal
        self._highest = 0.0  # of the episode's, whichever the sub-goal was
        self.stuck = self._done = False  # _done: the sub-goal promises nothing more
        steps = config.subgoal_steps or SUBGOAL_STEPS.get(count, (OTHER_STEPS,) * count)
        if count > 1 and len(steps) != count:
            raise ValueError(f"subgoal_steps has {len(steps)} entries for {count} sub-goals; expected one for each")
        self._budget, self._last = steps, count - 1

    def observe(self, energy_to: Callable[[int], float], moved: bool) -> float:
        """Take in the present energy to the sub-goals, by index, and pass on where it is time; the energy to the one pursued now.

        moved: whether something has run since the last time.
        """
        observed, config = energy_to(self.subgoal), self.config
        if not isfinite(observed):  # nothing is learned from that
            return observed
        if not moved and self._trail:
            self._trail.pop()
        self._trail.append(observed)
        self._highest = max(self._highest, observed)
        ends = self.subgoal == self._last
        if self._done and (not ends or self._has_failed()):
            return self._leave(energy_to)
        if ends:
            return observed
        if config.switch_energy is not None and observed < config.switch_energy:
            return self._pursue(self.subgoal + 1, energy_to)
        return self._leave(energy_to) if self._since >= self._budget[self.subgoal] else observed

    def look(self) -> int:
        """Notice whether it is stuck, and say how many steps to look ahead; where it is, the countdown begins anew."""
        config = self.config
        self.stuck = self._is_stuck()
        self._ahead = 0 if self.stuck else self._ahead
        return max(config.least_horizon, config.horizon - self._ahead) if config.countdown else config.horizon

    def promise(self, energy: float) -> None:
        """Take in what a new plan promises; where it is stuck, and that is nothing, it passes on at the next step."""
        self._done = self.stuck and energy >= self._trail[-1] - self._progress()

    def step(self, ran: bool) -> None:
        """A step has begun; a hold uses nothing up."""
        self._since += ran
        self._ahead += ran

    def _has_failed(self) -> bool:
        """Whether the sub-goal is still far, and a retry is left: the object was missed, or lost on the way."""
        retry = self.config.retry
        return retry is not None and self._retries < self.config.retries and self._trail[-1] > retry * self._highest

    def _leave(self, energy_to: Callable[[int], float]) -> float:
        """Pass to the next sub-goal, or to the first again where the present one has failed."""
        failed = self._has_failed()
        self._retries += failed
        return self._pursue(0 if failed else self.subgoal + 1, energy_to)

    def _pursue(self, subgoal: int, energy_to: Callable[[int], float]) -> float:
        before = self._trail[:-1] if subgoal == self.subgoal else []  # the same again: how far it was at first still counts
        self.subgoal, self._since, self._ahead, self.stuck, self._done = subgoal, 0, 0, False, False
        self._trail = [*before, energy_to(subgoal)]
        self._highest = max(self._highest, self._trail[-1])
        return self._trail[-1]

    def _progress(self) -> float:
        """The least decrease of energy that counts."""
        return self.config.progress * max(self._trail)

    def _is_stuck(self) -> bool:
        """Whether the last steps, after a countdown, brought no progress."""
        patience, config = self.config.patience, self.config
        after = self._ahead - (config.horizon - config.least_horizon if config.countdown else 0)
        if patience is None or after < patience:
            return False
        return min(self._trail[-patience:]) > min(self._trail[:-patience]) - self._progress()
