"""The energy around goal pictures: of rendered states, of what actions are imagined to lead to, of gripper commands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from envs.control import MAX_OPENING, MOVE, WORKSPACE
from envs.scene import OBJECTS
from envs.tasks import Pose, held_pose
from planners.imagine import look_ahead
from planners.sampling import SamplingConfig
from worldmodel.commands.dynamics import environment, object_of
from worldmodel.commands.policies import PROPRIO_SCALE
from worldmodel.energy import EnergyConfig, GoalEnergy
from worldmodel.interface import Context, Energy, Features
from worldmodel.model import LatentModel

RAY = 0.15  # m, how far around a goal
STRIDE = 0.01  # m, between two states on a ray
LEAST = 10  # states of a ray that counts; a shorter one ends at the workspace's border
LINES = ("x", "y", "z", "sight")  # along the axes, and along the first camera's line of sight
PLANES = ("xy", "xz")
KINDS = ("hand", "held object")
GRIPPER = {"close on the object": (-1,), "wait above it": (0, 1), "wait beside it": (0, 1), "let go of it": (1,)}  # right


@dataclass(frozen=True)
class Landscape:
    """Energies around one goal of each kind; the keys name kind, energy, and line or plane."""

    offsets: np.ndarray  # [R], m, of states on a line through the goal, none of them exactly there
    rays: dict[tuple[str, str, str], np.ndarray]  # [R], NaN outside the workspace
    moves: np.ndarray  # [G], m, of a step along an axis
    planes: dict[tuple[str, str, str], np.ndarray]  # [G, G]
    wanted: dict[tuple[str, str, str], np.ndarray]  # [2], m, the straight step to the goal
    commands: np.ndarray  # [C], gripper actions
    gripper: dict[tuple[str, str], np.ndarray]  # by what is right, and energy: [C]


def around(world: LatentModel, cameras: tuple[str, ...], seed: int) -> Landscape:
    """Energies around the goals that a seed draws: an open hand in the air, an object held there, and grasps."""
    rng, object = np.random.default_rng((seed, 2)), object_of(seed)
    env = environment(object, world.encoder.config.image_size, cameras, world.action_dim, True)
    env.reset(seed=seed)
    spec = OBJECTS[object]
    lying = np.append(rng.uniform(WORKSPACE[0, :2] + 0.02, WORKSPACE[1, :2] - 0.02), spec.half_height)
    yaw = rng.uniform(-spec.max_yaw, spec.max_yaw)
    camera = env.scene.model.camera(cameras[0]).id
    directions = dict(zip(LINES, [*np.eye(3), env.scene.data.cam_xmat[camera].reshape(3, 3)[:, 2]]))

    def free(tcp: np.ndarray, turn: float = yaw) -> Pose:
        return Pose(tcp, MAX_OPENING, MAX_OPENING, lying, turn)

    def held(tcp: np.ndarray) -> Pose:
        return held_pose(object, tcp - [0, 0, spec.grasp_height], yaw)

    offsets = (np.arange(-round(RAY / STRIDE), round(RAY / STRIDE)) + rng.uniform(0.05, 0.95)) * STRIDE
    moves, commands = np.linspace(-MOVE, MOVE, 21), np.linspace(-1, 1, 9)
    rays, planes, wanted, gripper = {}, {}, {}, {}
    for kind, pose, lowest in ((KINDS[0], free, 0.10), (KINDS[1], held, spec.half_height + spec.grasp_height)):
        low, high = np.maximum(WORKSPACE[0], [0, 0, lowest]), WORKSPACE[1]
        goal = rng.uniform(low, high)
        energies = _energies(world, env.observe_at(pose(goal)))
        for line, direction in directions.items():
            states = goal + offsets[:, None] * direction
            inside = ((states >= low) & (states <= high)).all(1)
            seen = [env.observe_at(pose(tcp)) for tcp in states[inside]]
            for name, energy in energies.items():
                values = np.full(len(states), np.nan)
                values[inside] = _of_states(world, energy, seen)
                rays[kind, name, line] = values
        for plane in PLANES:
            axes = [LINES.index(axis) for axis in plane]
            start = goal.copy()
            start[axes] = (goal[axes] + rng.uniform(-0.04, 0.04, 2)).clip(low[axes], high[axes])
            actions = np.zeros((len(moves), len(moves), world.action_dim), np.float32)
            actions[..., axes[0]], actions[..., axes[1]] = moves[:, None] / MOVE, moves[None] / MOVE
            now = env.observe_at(pose(start))
            for name, energy in energies.items():
                values = _of_actions(world, energy, now, actions.reshape(-1, world.action_dim))
                planes[kind, name, plane] = values.reshape(actions.shape[:2])
                wanted[kind, name, plane] = (goal - start)[axes]
    closed, grip = held_pose(object, lying, yaw), lying + [0, 0, spec.grasp_height]
    side = rng.uniform(0, 2 * np.pi)
    starts = {
        "close on the object": (free(grip), closed),
        "wait above it": (free(grip + [0, 0, rng.uniform(0.04, 0.08)]), closed),
        "wait beside it": (free(grip + 0.06 * np.array([np.cos(side), np.sin(side), 0.5])), closed),
        "let go of it": (closed, free(grip, closed.object_yaw)),
    }
    actions = np.zeros((len(commands), world.action_dim), np.float32)
    actions[:, -1] = commands
    for right, (start, goal) in starts.items():
        now = env.observe_at(start)
        for name, energy in _energies(world, env.observe_at(goal)).items():
            gripper[right, name] = _of_actions(world, energy, now, actions)
    return Landscape(offsets, rays, moves, planes, wanted, commands, gripper)


def _energies(world: LatentModel, goal: dict) -> dict[str, Energy]:
    """The energy of a goal picture as `worldmodel bench` has it in pick-place, and without what is read off for the hand."""
    features = world.encode({"pixels": goal["pixels"]})
    weights = {"patches": 0.0} | ({} if features.proprio is None else {"patches + hand": 2.0})
    return {
        name: GoalEnergy(features, EnergyConfig(proprio_weight=weight, proprio_scale=PROPRIO_SCALE))
        for name, weight in weights.items()
    }


def _of_states(world: LatentModel, energy: Energy, seen: list[dict]) -> np.ndarray:
    """Energies [n] of observed states."""
    if not seen:
        return np.zeros(0)
    states = world.encode({key: np.stack([obs[key] for obs in seen]) for key in seen[0]})
    states = Features(*(x[None, :, None, None] for x in states))  # [1, n, 1, 1, ...]
    return energy(states, torch.zeros(1, len(seen), 1, world.action_dim))[0, :, 0].numpy()


def _of_actions(world: LatentModel, energy: Energy, start: dict, actions: np.ndarray) -> np.ndarray:
    """Energies [n] of what is imagined to follow from one action each, [n, A], from a state of rest."""
    now = world.encode(start)
    context = Context(Features(*(x[None, None] for x in now)), torch.zeros(1, 0, world.action_dim))
    z = world.sample_z((1, 1, 1, 1), None)
    return look_ahead(world, context, energy, torch.from_numpy(actions)[None, :, None], z)[1][0, :, 0].numpy()


def minima(landscapes: list[Landscape]) -> dict:
    """How far the minima are from where they should be, how often the energy only rises from there, the gripper's choices.

    Spacings limit it: with a perfect energy, a minimum on a line is up to 5 mm off, one of actions up to 3.5 mm.
    """
    states, actions, gripper = {}, {}, {}
    for key in landscapes[0].rays:
        off, rises = [], []
        for one in landscapes:
            values, behind = one.rays[key], one.offsets < 0
            if np.isfinite(values).any():
                off.append(abs(one.offsets[np.nanargmin(values)]))
            for ray in (values[~behind], values[behind][::-1]):
                ray = ray[np.isfinite(ray)]
                if len(ray) >= LEAST:
                    rises.append(bool((np.diff(ray) > 0).all()))
        states[", ".join(key)] = _spread(off) | {"rays": len(rises), "rising": float(np.mean(rises)) if rises else None}
    for key in landscapes[0].planes:
        off = []
        for one in landscapes:
            best = np.unravel_index(one.planes[key].argmin(), one.planes[key].shape)
            off.append(np.linalg.norm(one.moves[list(best)] - one.wanted[key]))
        actions[", ".join(key)] = _spread(off)
    for key in landscapes[0].gripper:
        right = [chosen(one.commands, one.gripper[key]) in GRIPPER[key[0]] for one in landscapes]
        gripper[", ".join(key)] = float(np.mean(right))
    return {"goals": len(landscapes), "states": states, "actions": actions, "gripper": gripper}


def chosen(commands: np.ndarray, energies: np.ndarray) -> int:
    """Which of close, hold, open the planner would choose of a step: to move must pay by its margin."""
    three = {choice: float(energies[np.abs(commands - choice).argmin()]) for choice in (-1, 0, 1)}
    best = min(three, key=three.get)
    return best if three[best] < (1 - SamplingConfig().margin) * three[0] else 0


def _spread(metres: list[float]) -> dict[str, float]:
    return {"median_mm": 1e3 * float(np.median(metres)), "p95_mm": 1e3 * float(np.percentile(metres, 95))}
