"""The four tasks of V-JEPA 2-AC's table, and one of them with posts: where an episode starts, its goal, and what counts as success.

Reach, Grasp, ReachWithObject, PickPlace (V-JEPA 2, arXiv 2506.09985, section 4.2). Success is strict, pure and batched: it
reads an `Achieved` and a `Wanted` whose fields may carry any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from envs.control import MAX_OPENING, WORKSPACE
from envs.scene import OBJECTS, POST_RADIUS, POSTS, yaw_quat

REACH_DISTANCE = 0.02  # m
LIFT = 0.05  # m
HOLD_STEPS = 5  # whole control steps: 1 s
CARRY_DISTANCE = 0.03  # m, object to its target while held
PLACE_DISTANCE = 0.03  # m, object to its target
REST_SPEED = 0.02  # m/s
CLEARANCE = 0.05  # m, tool centre point to the object's origin
MIN_TRAVEL = 0.10  # m, from a start to its goal, at least
MARGIN = 0.02  # m, objects and targets stay this far inside the workspace
HOVER = 0.02  # m, held object over its place in the sub-goal before it is let go: a drop from there hurts nothing
RETRACT = 0.09  # m, hand over the placed object in the goal
ROOM = np.array([0.035, 0.10]) + POST_RADIUS  # m, in x and y, between a post and where the hand goes down: half the hand, and some
ASIDE = 0.03  # m, of a post from the straight way, at most


@dataclass(frozen=True)
class Achieved:
    """What a state, or a batch of states [...], amounts to."""

    tcp: np.ndarray  # [..., 3] m
    object_pos: np.ndarray  # [..., 3] m
    object_speed: np.ndarray  # [...] m/s
    touched: np.ndarray  # [...] bool, a finger or another part of the robot touches the object
    grasped: np.ndarray  # [...] bool, both fingers touch the object
    held_steps: np.ndarray  # [...] whole steps since the object has been LIFT up and grasped without a break


@dataclass(frozen=True)
class Wanted:
    """What an episode asks for: a target [..., 3], m, of the tool centre point (Reach) or of the object's origin."""

    target: np.ndarray


@dataclass(frozen=True)
class Pose:
    """A state of rest into which the simulator can be put: the hand straight down, fingers at `opening`."""

    tcp: np.ndarray  # [3] m
    opening: float  # m, between the fingers
    command: float  # m, commanded opening; below `opening` where an object is squeezed
    object_pos: np.ndarray  # [3] m
    object_yaw: float  # rad

    @property
    def object_quat(self) -> np.ndarray:
        """Orientation of the object [4], wxyz."""
        return yaw_quat(self.object_yaw)


@dataclass(frozen=True)
class Episode:
    """One drawn episode: its start, what is wanted, and the sub-goals, the last of which is the goal."""

    start: Pose
    wanted: Wanted
    subgoals: tuple[Pose, ...] = field(default=())
    posts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # [n, 2] m, fragile things in the way

    @property
    def goal(self) -> Pose:
        """The last sub-goal."""
        return self.subgoals[-1]


class Task(Protocol):
    """A task draws episodes and judges what was achieved in them."""

    name: str

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw an episode with an object of that name."""

    def success(self, achieved: Achieved, wanted: Wanted) -> np.ndarray:
        """Return bool [...]: the task is done."""


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = np.asarray(a) - np.asarray(b)
    return np.sqrt(np.add.reduce(difference * difference, axis=-1))  # np.linalg.norm, to the bit, in half its time


def _on_table(rng: np.random.Generator, half_height: float) -> np.ndarray:
    low, high = WORKSPACE[0, :2] + MARGIN, WORKSPACE[1, :2] - MARGIN
    return np.append(rng.uniform(low, high), half_height)


def _far(rng: np.random.Generator, draw, origin: np.ndarray, least: float) -> np.ndarray:
    """Draw points until one is at least `least` metres from `origin`; every half of the workspace holds one."""
    while True:
        point = draw(rng)
        if _distance(point, origin) >= least:
            return point


def _open_start(object: str, rng: np.random.Generator) -> Pose:
    """Object on the table, gripper open over it: within 12 cm of it laterally, 10 to 22 cm high."""
    spec = OBJECTS[object]
    pos = _on_table(rng, spec.half_height)
    lateral = np.clip(pos[:2] + rng.uniform(-0.085, 0.085, 2), WORKSPACE[0, :2], WORKSPACE[1, :2])
    tcp = np.append(lateral, rng.uniform(0.10, 0.22))
    yaw = rng.uniform(-spec.max_yaw, spec.max_yaw)
    return Pose(tcp, MAX_OPENING, MAX_OPENING, pos, yaw)


def held_pose(object: str, object_pos: np.ndarray, yaw: float) -> Pose:
    """Return the pose that holds the object at `object_pos` [3], the fingers closed on it."""
    spec = OBJECTS[object]
    yaw = 0.0 if object == "box" else yaw  # closing fingers turn a box until its sides lie against them
    return Pose(object_pos + [0, 0, spec.grasp_height], spec.width, 0.0, np.array(object_pos), yaw)


@dataclass(frozen=True)
class Reach:
    """Bring the tool centre point within 2 cm of a point in the air. An object stands by."""

    name: str = "reach"

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw a start and a target at least 10 cm from it and above the object."""
        start = _open_start(object, rng)
        low, high = WORKSPACE + [[0.01, 0.01, 0.09], [-0.01, -0.01, -0.01]]
        target = _far(rng, lambda r: r.uniform(low, high), start.tcp, MIN_TRAVEL)
        goal = Pose(target, MAX_OPENING, MAX_OPENING, start.object_pos, start.object_yaw)
        return Episode(start, Wanted(target), (goal,))

    def success(self, achieved: Achieved, wanted: Wanted) -> np.ndarray:
        """Hand within REACH_DISTANCE of the target."""
        return _distance(achieved.tcp, wanted.target) <= REACH_DISTANCE


@dataclass(frozen=True)
class Grasp:
    """Lift the object 5 cm and hold it for 1 s. `wanted.target` is the object's place in the goal picture, 8 cm up."""

    name: str = "grasp"

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw a start; sub-goals: closed on the object, object lifted."""
        start = _open_start(object, rng)
        closed = held_pose(object, start.object_pos, start.object_yaw)
        lifted = held_pose(object, start.object_pos + [0, 0, 0.08], start.object_yaw)
        return Episode(start, Wanted(lifted.object_pos), (closed, lifted))

    def success(self, achieved: Achieved, wanted: Wanted) -> np.ndarray:
        """Held for HOLD_STEPS and held now."""
        return np.asarray(achieved.grasped) & (np.asarray(achieved.held_steps) >= HOLD_STEPS)


@dataclass(frozen=True)
class ReachWithObject:
    """Carry the object, held from the start, to within 3 cm of a point in the air."""

    name: str = "reach-with-object"

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw a start and a target, both in the air, at least 10 cm apart."""
        spec = OBJECTS[object]
        low, high = WORKSPACE + [[MARGIN, MARGIN, 0], [-MARGIN, -MARGIN, 0]]
        low[2], high[2] = spec.half_height + 0.03, WORKSPACE[1, 2] - spec.grasp_height - 0.03
        first = rng.uniform(low, high)
        target = _far(rng, lambda r: r.uniform(low, high), first, MIN_TRAVEL)
        yaw = rng.uniform(-spec.max_yaw, spec.max_yaw)
        return Episode(held_pose(object, first, yaw), Wanted(target), (held_pose(object, target, yaw),))

    def success(self, achieved: Achieved, wanted: Wanted) -> np.ndarray:
        """Object within CARRY_DISTANCE of the target, and held."""
        return np.asarray(achieved.grasped) & (_distance(achieved.object_pos, wanted.target) <= CARRY_DISTANCE)


@dataclass(frozen=True)
class PickPlace:
    """Bring the object to a place on the table at least 10 cm away, let go, and draw back."""

    name: str = "pick-place"

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw a start and a target; sub-goals of V-JEPA 2-AC: grasped, held over the target, placed."""
        start = _open_start(object, rng)
        spec = OBJECTS[object]
        target = _far(rng, lambda r: _on_table(r, spec.half_height), start.object_pos, MIN_TRAVEL)
        grasped = held_pose(object, start.object_pos, start.object_yaw)
        near = held_pose(object, target + [0, 0, HOVER], start.object_yaw)
        above = target + [0, 0, RETRACT + spec.grasp_height]
        placed = Pose(above, MAX_OPENING, MAX_OPENING, target, grasped.object_yaw)
        return Episode(start, Wanted(target), (grasped, near, placed))

    def success(self, achieved: Achieved, wanted: Wanted) -> np.ndarray:
        """Object within PLACE_DISTANCE of the target, at rest, untouched, hand CLEARANCE away."""
        placed = _distance(achieved.object_pos, wanted.target) <= PLACE_DISTANCE
        rests = np.asarray(achieved.object_speed) <= REST_SPEED
        away = _distance(achieved.tcp, achieved.object_pos) >= CLEARANCE
        return placed & rests & ~np.asarray(achieved.touched) & away


@dataclass(frozen=True)
class PickPlaceFragile(PickPlace):
    """PickPlace with one to three fragile posts between start and target, 8 cm high: carry over them, or around."""

    name: str = "pick-place-fragile"

    def draw(self, object: str, rng: np.random.Generator) -> Episode:
        """Draw an episode of PickPlace whose way is long enough for a post that the hand need not touch at either end."""
        wanted = int(rng.integers(1, POSTS + 1))
        while True:
            episode = super().draw(object, rng)
            ends = np.array([episode.start.object_pos[:2], episode.wanted.target[:2]])
            posts: list[np.ndarray] = []
            for _ in range(10 * wanted):
                spot = _beside(ends, rng)
                apart = all(_distance(spot, other) > 5 * POST_RADIUS for other in posts)
                if len(posts) < wanted and apart and leaves_room(spot, episode):
                    posts.append(spot)
            if posts:
                return replace(episode, posts=np.array(posts))


def leaves_room(spot: np.ndarray, episode: Episode) -> bool:
    """Tell whether a post at `spot` [2] leaves the hand room to go down where the object is, and where it is to be."""
    ends = np.array([episode.start.object_pos[:2], episode.wanted.target[:2]])
    return bool((abs(spot - ends) > ROOM).any(1).all())


def _beside(ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a point [2] near the middle of the straight way between two ends [2, 2]."""
    way = ends[1] - ends[0]
    across = np.array([-way[1], way[0]]) / _distance(*ends)
    return ends[0] + rng.uniform(0.25, 0.75) * way + rng.uniform(-ASIDE, ASIDE) * across


TASKS: dict[str, Task] = {
    task.name: task for task in (Reach(), Grasp(), ReachWithObject(), PickPlace(), PickPlaceFragile())
}
