"""Scripted policies: one that solves each task, and noisy, failing and playing ones, because a model must see what goes wrong.

A policy is called with an env's `info` and returns an action [action_dim] in [-1, 1]. It reads "privileged/*" only, keeps the
small memory of one episode, and draws from the numpy Generator it was made with. Make a new one for every episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from envs.base import EnvConfig
from envs.control import MAX_OPENING, MOVE, TURN, WORKSPACE
from envs.scene import OBJECTS, POST_HEIGHT
from envs.tasks import RETRACT

Info = Mapping[str, Any]
Policy = Callable[[Info], np.ndarray]
TURNED = np.array([0.25, 0.25, 0.6])  # rad, rotation vector, at most, of hands that play with it
_NEAR = 0.007  # m; a waypoint counts as reached
_UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Style:
    """How an expert goes about its task; the default is plain and quick."""

    speed: float = 1.0  # of the fastest motion, in (0, 1]
    hover: float = 0.08  # m over the grasp, before it descends
    carry: float = 0.06  # m, how high it carries
    noise: float = 0.0  # standard deviation added to each motion of the action
    pause: float = 0.0  # probability per step of standing still
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, mistake about where the object is
    early_close: bool = False  # close before it has come down
    drop_at: int | None = None  # steps after the grasp at which it lets go
    release: float = 0.0  # m over the table at which it lets go
    blind: bool = False  # does not notice that it holds nothing
    careless: bool = False  # carries as if there were no posts
    direct: bool = False  # makes for the object in a straight line, not from above


def _length(vector: np.ndarray) -> float:
    """Length of a vector [n]; np.linalg.norm, to the bit, in a third of its time."""
    return math.sqrt(vector.dot(vector))


class Expert:
    """The scripted solution of the task of a config: approach from above, close, lift, carry, lower, open, draw back."""

    def __init__(self, config: EnvConfig, rng: np.random.Generator, style: Style | None = None) -> None:
        self._task, self._spec, self._dim = config.task, OBJECTS[config.object], config.action_dim
        self._rng, self._style = rng, style or Style()
        self._phase = {"reach": self._reach, "reach-with-object": self._deliver}.get(config.task, self._approach)
        self._count = self._holding = 0
        minds = config.task == "pick-place-fragile" and not self._style.careless
        if minds:
            self._style = replace(self._style, hover=max(self._style.hover, 0.08))
        self._carried = max(self._style.carry, 0.055) + POST_HEIGHT - 0.035 if minds else self._style.carry  # m, the object's foot
        self._clear = self._carried - 0.01 if minds else 0.02  # m, from where on it moves sideways

    def __call__(self, info: Info) -> np.ndarray:
        """Return the action [action_dim] for the state that `info` tells of."""
        style = self._style
        tcp = info["privileged/tcp_pos"]
        goal, opening = self._phase(info)
        motion = (goal - tcp) / MOVE
        motion *= min(1.0, style.speed / max(*map(abs, motion.tolist()), 1e-9))
        if style.noise:
            motion = motion + self._rng.normal(0.0, style.noise, 3)
        if style.pause and self._rng.random() < style.pause:
            motion = np.zeros(3)
        return compose(motion, opening, info, self._dim)

    def _object(self, info: Info) -> np.ndarray:
        return info["privileged/object_pos"] + np.array(self._style.offset)

    def _go(self, phase: Callable[[Info], tuple[np.ndarray, float]], info: Info) -> tuple[np.ndarray, float]:
        self._phase, self._count = phase, 0
        return phase(info)

    # Phases: each returns where the hand should be, m, and the opening it commands, m.

    def _reach(self, info: Info):
        return info["privileged/target_pos"], MAX_OPENING

    def _approach(self, info: Info):
        if self._style.direct:
            return self._go(self._descend, info)
        tcp, grasp = info["privileged/tcp_pos"], self._object(info) + self._spec.grasp_height * _UP
        hover = grasp + self._style.hover * _UP
        lateral = _length(tcp[:2] - grasp[:2])
        if lateral < _NEAR + self._style.noise * 0.02 and info["privileged/command"] > 0.07:
            return self._go(self._descend, info)
        if tcp[2] < hover[2] - 0.03 and lateral > 0.02:  # low beside the object: up first
            hover[:2] = tcp[:2]
        return hover, MAX_OPENING

    def _descend(self, info: Info):
        tcp, grasp = info["privileged/tcp_pos"], self._object(info) + self._spec.grasp_height * _UP
        self._count += 1
        if self._style.early_close and tcp[2] - grasp[2] < 0.06 or abs(tcp[2] - grasp[2]) < _NEAR or self._count > 12:
            return self._go(self._close, info)
        return grasp, MAX_OPENING

    def _close(self, info: Info):
        self._count += 1
        if self._count > 2 or (self._count > 1 and info["privileged/grasped"]):
            return self._go(self._carry if self._task.startswith("pick-place") else self._lift, info)
        return info["privileged/tcp_pos"], 0.0

    def _lost(self, info: Info) -> bool:
        """Count the steps of carrying; tell whether to start again."""
        self._holding += 1
        return not self._style.blind and not info["privileged/grasped"]

    def _grip(self) -> float:
        drop = self._style.drop_at
        return MAX_OPENING if drop is not None and self._holding > drop else 0.0

    def _lift(self, info: Info):
        if self._lost(info):
            return self._go(self._approach, info)
        tcp = info["privileged/tcp_pos"]
        return np.array([tcp[0], tcp[1], self._spec.half_height + self._spec.grasp_height + 0.08]), self._grip()

    def _deliver(self, info: Info):
        self._holding += 1
        return info["privileged/target_pos"] + self._spec.grasp_height * _UP, self._grip()

    def _carry(self, info: Info):
        if self._lost(info):
            return self._go(self._approach, info)
        tcp, target = info["privileged/tcp_pos"], info["privileged/target_pos"]
        held = info["privileged/object_pos"] if info["privileged/grasped"] else tcp
        to_target = target[:2] - held[:2]
        low = self._spec.half_height + self._spec.grasp_height
        goal = np.array([tcp[0], tcp[1], low + self._carried])
        if tcp[2] > low + self._clear:
            goal[:2] += to_target
        if _length(to_target) < 0.01 + self._style.noise * 0.02:
            return self._go(self._lower, info)
        return goal, self._grip()

    def _lower(self, info: Info):
        if self._lost(info) and self._count == 0:
            return self._go(self._approach, info)
        self._count += 1
        tcp, target, held = info["privileged/tcp_pos"], info["privileged/target_pos"], info["privileged/object_pos"]
        gap = held[2] - self._spec.half_height - self._style.release if info["privileged/grasped"] else 0.0
        if gap < 0.004 or self._count > 8:
            return self._go(self._open, info)
        return np.array([*(tcp[:2] + target[:2] - held[:2]), tcp[2] - gap + 0.001]), self._grip()

    def _open(self, info: Info):
        self._count += 1
        if self._count > 2 or (self._count > 1 and not info["privileged/touched"]):
            return self._go(self._retract, info)
        return info["privileged/tcp_pos"], MAX_OPENING

    def _retract(self, info: Info):
        tcp, target = info["privileged/tcp_pos"], info["privileged/target_pos"]
        missed = _length(info["privileged/object_pos"] - target) > 0.03
        if missed and not self._style.blind and tcp[2] > 0.10:
            return self._go(self._approach, info)
        return np.array([tcp[0], tcp[1], self._spec.half_height + self._spec.grasp_height + 0.09]), MAX_OPENING


class Careful:
    """Picks and places where a mistake hurts: high up until it is over a place, then straight down, slowly at last, with room left below.

    It keeps no memory: what it does hangs on where things are alone, from wherever it comes, as a policy must that sees one
    picture. `noise` is a share of each motion; a jolt, which begins so often, is a step or two of anything. So often it
    first comes `astray`: straight to somewhere beside the object, and low.
    """

    HIGH, LIFTED = 0.09, 0.105  # m over the place, where the open hand and what it carries go sideways: over the posts
    NEAR, SLOPE = 0.008, 6.0  # m aside, where it may be all the way down; m that it is higher for each further
    OVER, BESIDE = 0.035, 0.02  # m over the place, from where on it may go so far sideways
    ROOM = 0.005  # m over the table, and over the middle of the grasp, where it closes and lets go
    SLOW = 0.4  # of an action, on the last 4 cm down

    def __init__(self, config: EnvConfig, rng: np.random.Generator, noise: float = 0.0, jolts: float = 0.0, astray: float = 0.0) -> None:
        self._spec, self._dim, self._rng = OBJECTS[config.object], config.action_dim, rng
        self._noise, self._jolts, self._left, self._jolt = noise, jolts, 0, np.zeros(3)
        self._astray = int(rng.integers(1, 5)) if rng.random() < astray else 0  # steps
        self._beside = np.append(rng.normal(0.0, 0.015, 2), rng.uniform(0.02, 0.08))

    def __call__(self, info: Info) -> np.ndarray:
        """Return the action [action_dim] for the state that `info` tells of."""
        motion, opening = self._wanted(info)
        motion = _bounded(motion / MOVE)
        if self._noise:
            motion = motion + self._rng.normal(0.0, self._noise, 3) * max(0.1, *map(abs, motion.tolist()))
        if self._jolts and not self._left and self._rng.random() < self._jolts:
            self._left, self._jolt = int(self._rng.integers(1, 3)), self._rng.uniform(-1, 1, 3) * self._rng.uniform(0.2, 1.0)
        if self._left:
            self._left, motion = self._left - 1, self._jolt
        elif self._astray:
            self._astray -= 1
            motion = _bounded((info["privileged/object_pos"] + self._beside - info["privileged/tcp_pos"]) / MOVE)
        return compose(motion, opening, info, self._dim)

    def _wanted(self, info: Info) -> tuple[np.ndarray, float]:
        """The motion [3], m, and the opening that is commanded, m."""
        tcp, thing, target = info["privileged/tcp_pos"], info["privileged/object_pos"], info["privileged/target_pos"]
        spec, still = self._spec, np.zeros(3)
        command, opening, held = info["privileged/command"], info["privileged/opening"], info["privileged/grasped"]
        grasp, foot = thing + (spec.grasp_height + self.ROOM) * _UP, thing[2] - spec.half_height
        if foot < self.ROOM + 0.004 and _length((target - thing)[:2]) < 0.012:  # there: let go, then up
            free = opening > spec.width + 0.02
            return (max(0.0, grasp[2] + RETRACT - tcp[2]) * _UP if free else still), MAX_OPENING
        if held and foot < 0.02 and command > 0:
            return still, 0.0
        if held:
            return self._way(thing, np.array([*target[:2], spec.half_height + self.ROOM - 0.001]), self.LIFTED), 0.0
        aside, above = _length((tcp - grasp)[:2]), abs(tcp[2] - grasp[2])
        if command < 0.07:  # it has begun to close
            missed = max(aside, above) > 0.015 or (command < 0.01 and opening < spec.width - 0.012)
            return (0.02 * _UP, MAX_OPENING) if missed else (still, 0.0)
        if aside < 0.011 and above < 0.008:
            return still, 0.0
        return self._way(tcp, grasp, self.HIGH), MAX_OPENING

    def _way(self, at: np.ndarray, place: np.ndarray, high: float) -> np.ndarray:
        """The motion [3], m, from a point [3] towards a place [3]; sideways as far as it is high enough for that."""
        to, above = (place - at)[:2], at[2] - place[2]
        aside = _length(to)
        least = self._height(aside - self.BESIDE, self.OVER, high) if aside > self.NEAR else 0.0
        free = min(1.0, max(0.0, 1.0 - (least - above) / 0.02))
        step = to * free
        step = step * min(1.0, MOVE / max(*map(abs, step.tolist()), 1e-9))
        then = self._height(max(_length(to - step), 0.6 * aside) - self.NEAR, 0.0, high)  # a step that ends over the place begins beside it
        rise = (then if free == 1.0 else max(then, least + 0.005)) - above
        return np.array([*step, max(rise, -min(MOVE, max(above - 0.04, self.SLOW * MOVE)))])

    def _height(self, beyond: float, least: float, high: float) -> float:
        """m over a place, so far beyond where it may be at the least height."""
        return min(least + self.SLOPE * max(0.0, beyond), high)


def _bounded(motion: np.ndarray) -> np.ndarray:
    """The motion [3] in units of an action, shortened so that none of it is beyond 1."""
    return motion / max(1.0, *map(abs, motion.tolist()))


def compose(motion: np.ndarray, opening: float, info: Info, dim: int) -> np.ndarray:
    """Return an action [dim] float32: `motion` [3] in units of an action, and whatever leads to a commanded opening in m."""
    action = np.zeros(dim)
    action[:3] = motion
    action[-1] = (opening - info["privileged/command"]) / MAX_OPENING
    return action.clip(-1.0, 1.0).astype(np.float32)


class Play:
    """Smooth random motion, mostly near the object: grasps, lifts, pushes, drops, and way-points low over the table."""

    def __init__(self, config: EnvConfig, rng: np.random.Generator) -> None:
        self._spec, self._dim, self._rng = OBJECTS[config.object], config.action_dim, rng
        self._left = 0
        self._noise = np.zeros(3)
        self._sigma = rng.uniform(0.0, 0.3)
        self._goal, self._opening, self._speed = np.zeros(3), MAX_OPENING, 1.0
        self._exact = False

    def __call__(self, info: Info) -> np.ndarray:
        """Return the action [action_dim] for the state that `info` tells of."""
        tcp, rng = info["privileged/tcp_pos"], self._rng
        if self._left <= 0 or _length(self._goal - tcp) < 0.015:
            self._choose(info)
        self._left -= 1
        self._noise = 0.7 * self._noise + 0.7 * rng.normal(0.0, self._sigma, 3)
        motion = (self._goal - tcp) / MOVE
        motion = motion * min(1.0, self._speed / max(*map(abs, motion.tolist()), 1e-9))
        if not self._exact:
            motion = motion + self._noise
        return compose(motion, self._opening, info, self._dim)

    def _choose(self, info: Info) -> None:
        """Choose the next way-point, opening and speed."""
        rng, spec, tcp = self._rng, self._spec, info["privileged/tcp_pos"]
        grasp = info["privileged/object_pos"] + spec.grasp_height * _UP
        free = rng.uniform(WORKSPACE[0], WORKSPACE[1])
        self._left, self._speed, self._exact = int(rng.integers(2, 9)), rng.uniform(0.4, 1.0), False
        kind = rng.random()
        over = _length(tcp[:2] - grasp[:2]) < 0.012
        if info["privileged/grasped"] and self._opening < spec.width:
            if kind < 0.2:  # let go, wherever that is
                self._goal, self._opening, self._left = tcp, MAX_OPENING, 1
            elif kind < 0.4:  # put it down
                self._goal = np.array([tcp[0], tcp[1], spec.half_height + spec.grasp_height])
            else:
                self._goal = np.maximum(free, [0, 0, grasp[2] - info["privileged/object_pos"][2] + spec.half_height])
        elif over and tcp[2] - grasp[2] < 0.015 and kind < 0.85:  # around the object: close
            self._goal, self._opening, self._left, self._exact = tcp, 0.0, 2, True
        elif over and kind < 0.8:  # over the object: down
            self._goal, self._opening, self._exact = grasp, MAX_OPENING, True
        elif kind < 0.45:  # over the object
            self._goal, self._opening = grasp + rng.uniform(0.05, 0.10) * _UP, MAX_OPENING
            self._exact, self._left = True, 8
        elif kind < 0.65:  # beside the object, low: pushes
            self._goal = grasp + np.append(rng.normal(0.0, 0.05, 2), rng.uniform(-0.01, 0.04))
            self._opening = rng.choice([0.0, MAX_OPENING, rng.uniform(0, MAX_OPENING)])
        else:
            self._goal = free if kind < 0.85 else np.append(free[:2], rng.uniform(0.015, 0.07))
            self._opening = rng.choice([self._opening, 0.0, MAX_OPENING, rng.uniform(0, MAX_OPENING)])
        self._goal = self._goal.clip(*WORKSPACE)


class Turning:
    """What another does, with a hand that meanwhile turns to drawn orientations and back to straight down, as far as it has been told."""

    def __init__(self, policy: Policy, rng: np.random.Generator) -> None:
        self._policy, self._rng, self._left = policy, rng, 0
        self._at = self._goal = Rotation.identity()  # from straight down, in the base's frame

    def __call__(self, info: Info) -> np.ndarray:
        """Return the action [7] for the state that `info` tells of."""
        rng = self._rng
        if self._left <= 0:
            self._left = int(rng.integers(3, 9))
            self._goal = Rotation.from_rotvec((rng.random() < 0.6) * rng.uniform(-TURNED, TURNED))
        self._left -= 1
        turn = ((self._goal * self._at.inv()).as_rotvec() / TURN + rng.normal(0.0, 0.1, 3)).clip(-1.0, 1.0)
        self._at = Rotation.from_rotvec(TURN * turn) * self._at
        action = self._policy(info)
        action[3:6] = turn
        return action


def _turning(config: EnvConfig, policy: Policy, rng: np.random.Generator) -> Policy:
    """The policy, which turns the hand where actions can."""
    return Turning(policy, rng) if config.action_dim == 7 else policy


def _styled(rng: np.random.Generator) -> Style:
    return Style(speed=rng.uniform(0.5, 1.0), hover=rng.uniform(0.05, 0.10), carry=rng.uniform(0.04, 0.10))


def _careless(config: EnvConfig, often: float, style: Style, rng: np.random.Generator) -> Style:
    """The style, which where there are posts does not mind them so often."""
    return replace(style, careless=bool(rng.random() < often)) if config.task == "pick-place-fragile" else style


def expert(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return the plain expert of the config's task."""
    return Expert(config, rng)


def varied(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return an expert whose speed and heights are drawn."""
    return Expert(config, rng, _styled(rng))


def noisy(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return an expert with noise on its motions and pauses."""
    style = replace(_styled(rng), noise=rng.uniform(0.1, 0.5), pause=rng.uniform(0.0, 0.2))
    return _turning(config, Expert(config, rng, _careless(config, 0.3, style, rng)), rng)


def failing(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return an expert with one mistake: beside or above the object, too early, dropping, or letting go too high."""
    style = replace(_styled(rng), noise=rng.uniform(0.0, 0.2), blind=bool(rng.random() < 0.6))
    kind = int(rng.integers(5))
    side = rng.uniform(0.02, 0.05) * np.array([np.cos(t := rng.uniform(0, 2 * np.pi)), np.sin(t)])
    mistakes = (
        {"offset": (float(side[0]), float(side[1]), 0.0)},
        {"offset": (0.0, 0.0, float(rng.uniform(0.03, 0.06)))},
        {"early_close": True},
        {"drop_at": int(rng.integers(1, 8))},
        {"release": float(rng.uniform(0.02, 0.08))},
    )
    return _turning(config, Expert(config, rng, _careless(config, 0.7, replace(style, **mistakes[kind]), rng)), rng)


def hasty(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return an expert that takes the shortest way: aslant onto the object, often onto its rim, and low past posts."""
    style = Style(
        speed=rng.uniform(0.4, 1.0), carry=rng.uniform(0.02, 0.06), noise=rng.uniform(0.0, 0.3), blind=bool(rng.random() < 0.5),
        offset=(*(float(x) for x in rng.normal(0.0, 0.01, 2)), float(rng.uniform(-0.01, 0.02))), direct=True,
        release=max(0.0, float(rng.uniform(-0.04, 0.04))),
    )  # fmt: skip
    return Expert(config, rng, _careless(config, 0.7, style, rng))


def careful(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return an expert that keeps away from all that could be hurt, at times jolted off its way, which it finds back to."""
    return Careful(config, rng, rng.uniform(0.0, 0.15), rng.choice([0.0, 0.1]), 0.4)


def play(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return a playing policy."""
    return _turning(config, Play(config, rng), rng)


def random(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return a policy of independent uniform actions."""
    return lambda info: rng.uniform(-1.0, 1.0, config.action_dim).astype(np.float32)


def nothing(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return a policy that never moves."""
    return lambda info: np.zeros(config.action_dim, np.float32)


def mixture(config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return one of varied (25 %), noisy (25 %), failing (20 %), play (30 %), drawn."""
    makers = (varied, noisy, failing, play)
    return makers[rng.choice(4, p=(0.25, 0.25, 0.2, 0.3))](config, rng)


BEHAVIOURS: dict[str, Callable[[EnvConfig, np.random.Generator], Policy]] = {
    f.__name__: f for f in (expert, varied, noisy, failing, hasty, careful, play, random, nothing, mixture)
}


def make_policy(name: str, config: EnvConfig, rng: np.random.Generator) -> Policy:
    """Return a fresh policy for one episode. Raises ValueError naming the known behaviours."""
    if name not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour {name!r}: expected one of {', '.join(BEHAVIOURS)}")
    return BEHAVIOURS[name](config, rng)
