"""The environment: a plain Gymnasium interface over scene, controller and task.

Observations are {"pixels": uint8 [h, w, 3], "proprio": float32 [7]} with proprio = tool centre point xyz (m, base frame),
extrinsic xyz Euler angles of the hand relative to straight down (rad), opening of the gripper (m, measured).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from envs.control import STEP_SECONDS, ControlState, Controller, euler_from_down
from envs.randomize import LEVELS, MOVES_AT, Randomizer, Variation
from envs.scene import CAMERAS, OBJECTS, Contacts, Scene
from envs.tasks import LIFT, TASKS, Achieved, Episode, Pose

ACTION_DIMS = 4, 7  # without and with rotation
OBJECT_FORCE_LIMIT = 100.0  # N, on the object from a finger, the rest of the robot or the table; a firm grip is 50, fingers closing on a cup up to 95
TABLE_FORCE_LIMIT = 60.0  # N
POST_FORCE_LIMIT = 5.0  # N, on fragile posts: a touch
DROP_HEIGHT = 0.05  # m
SETTLE_SECONDS = 0.1
JOINT_MARGIN = 0.01  # rad
_LOW = np.array([-1.0, -1.0, -0.2, -np.pi, -np.pi, -np.pi, -0.05], np.float32)
_HIGH = np.array([1.0, 1.0, 1.2, np.pi, np.pi, np.pi, 0.13], np.float32)


@dataclass(frozen=True)
class EnvConfig:
    """What an environment is made of. Unknown names raise ValueError naming the known ones."""

    task: str = "pick-place"  # reach, grasp, reach-with-object, pick-place, pick-place-fragile
    object: str = "box"  # box, cup, can
    image_size: int = 96  # pixels, height and width of one view
    cameras: tuple[str, ...] = ("front",)  # front, side, wrist; several are put side by side: pixels [h, w * views, 3]
    action_dim: int = 4  # 4: dx, dy, dz, gripper; 7: dx, dy, dz, rotation vector, gripper
    max_steps: int = 40  # control steps of 0.2 s until truncation
    randomization: str = "none"  # one of randomize.LEVELS
    render_goals: bool = True  # False: goals carry no pixels; for collecting data
    stop_on_success: bool = True  # False: an episode goes on until max_steps
    render_observations: bool = True  # False: they carry qpos instead of pixels, which `Scene.film` draws afterwards

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        known = {"task": TASKS, "object": OBJECTS, "randomization": LEVELS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(values)}")
        if not self.cameras or any(camera not in CAMERAS for camera in self.cameras):
            raise ValueError(f"unknown cameras {self.cameras!r}: expected some of {', '.join(CAMERAS)}")
        if self.action_dim not in ACTION_DIMS:
            raise ValueError(f"action_dim is {self.action_dim}: expected {' or '.join(map(str, ACTION_DIMS))}")
        if self.randomization == "moved-post" and self.task != "pick-place-fragile":
            raise ValueError(f"randomization is moved-post, and {self.task} has no posts: expected the task pick-place-fragile")
        if self.randomization == "occluder" and "front" not in self.cameras:
            raise ValueError(f"randomization is occluder, which hides things from the front camera; got {', '.join(self.cameras)}")
        if not 16 <= self.image_size <= 1024:
            raise ValueError(f"image_size is {self.image_size}: expected 16 to 1024 pixels")
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: expected at least 1")


@dataclass(frozen=True)
class EnvState:
    """Everything that the future of an environment depends on."""

    physics: np.ndarray
    control: ControlState
    episode: Episode
    variation: Variation
    goal: dict[str, np.ndarray]
    subgoals: list[dict[str, np.ndarray]]
    rng: dict[str, Any]
    steps: int
    held_steps: int
    was_held: bool
    top: float


def _copy(obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.copy() for key, value in obs.items()}


def _proprio(pos: np.ndarray, mat: np.ndarray, opening: float) -> np.ndarray:
    return np.concatenate([pos, euler_from_down(mat), [opening]]).astype(np.float32)


class PandaEnv(gym.Env):
    """A Panda arm, a table, one object, one task. Nothing is shared between two of these."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / STEP_SECONDS)}

    def __init__(self, config: EnvConfig, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {render_mode!r}: expected rgb_array or None")
        self.config, self.render_mode = config, render_mode
        self.task = TASKS[config.task]
        size = config.image_size
        self.scene = Scene(config.object, size, config.cameras)
        seen = {"pixels": gym.spaces.Box(0, 255, (size, size * len(config.cameras), 3), np.uint8)}
        if not config.render_observations:
            seen = {"qpos": gym.spaces.Box(-np.inf, np.inf, (self.scene.model.nq,), np.float64)}
        self.observation_space = gym.spaces.Dict({**seen, "proprio": gym.spaces.Box(_LOW, _HIGH)})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (config.action_dim,), np.float32)
        self.controller = Controller(self.scene)
        self.randomizer = Randomizer(self.scene)
        self.variation = Variation({}, None)
        self.episode: Episode | None = None

    # Gymnasium.

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Draw an episode and put the scene at its start. Returns observation and info."""
        super().reset(seed=seed)
        rng = self.np_random
        self.scene.reset()
        self.episode = self.task.draw(self.config.object, rng)
        places = [pose.object_pos[:2] for pose in (self.episode.start, *self.episode.subgoals)] + [*self.episode.posts]
        self.variation = self.randomizer.draw(self.config.randomization, np.array(places), rng)
        moves = self.randomizer.draw_moves(self.config.randomization, self.episode, rng)
        self.variation = replace(self.variation, moves=moves)
        self.randomizer.apply(self.variation)
        self.scene.put_posts(self.episode.posts)
        self._steps = self._held_steps = 0
        self._subgoals = [self.observe_at(pose) for pose in self.episode.subgoals]
        self._goal = self._subgoals[-1]
        self.put(self.episode.start)
        return self.observe(), self._info({}, self.scene.contacts())

    def step(self, action: np.ndarray):
        """Run one action [A] in [-1, 1] for 0.2 s. Raises ValueError where it is not finite, or of another shape."""
        action = self._checked(action)
        if self.variation.moves is not None and self._steps == MOVES_AT:
            self.scene.put_posts(self.episode.posts + self.variation.moves)
        contacts = []
        for _ in self.controller.step(action):
            contacts.append(self.scene.contacts())
        mujoco.mj_forward(self.scene.model, self.scene.data)
        contacts.append(self.scene.contacts())
        now = contacts[-1]
        self._steps += 1
        held = self._is_held(now)
        self._held_steps = self._held_steps + 1 if held and self._was_held else 0
        unsafe = self._unsafe(contacts)
        self._was_held = held
        info = self._info(unsafe, now)
        success = info["success"]
        over = self._steps >= self.config.max_steps
        return self.observe(), float(success), success and self.config.stop_on_success, over, info

    def render(self) -> np.ndarray | None:
        """Return the picture uint8 [h, w * views, 3]."""
        return self.scene.render() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the GL context."""
        self.scene.close()

    # Observation and info.

    def proprio(self) -> np.ndarray:
        """Return float32 [7]: tool centre point (m), Euler angles relative to straight down (rad), opening (m)."""
        return _proprio(self.scene.tcp_pos, self.scene.tcp_mat, self.scene.opening)

    def observe(self) -> dict[str, np.ndarray]:
        """Return the observation of the present state."""
        if not self.config.render_observations:
            return {"qpos": self.scene.data.qpos.copy(), "proprio": self.proprio()}
        return {"pixels": self.scene.render(), "proprio": self.proprio()}

    def observe_at(self, pose: Pose) -> dict[str, np.ndarray]:
        """Return the observation of a state of rest; the present state is left exactly as it was."""
        if not self.config.render_goals:
            return {"proprio": _proprio(*self.controller.hand_at(pose.tcp), pose.opening)}
        before = self.scene.get_state()
        joints = self.controller.joints_at(pose.tcp)
        self.scene.place(joints, pose.opening, pose.object_pos, pose.object_quat)
        seen = self.observe()
        self.scene.set_state(before)
        return seen

    def _achieved(self, contacts: Contacts) -> Achieved:
        scene = self.scene
        return Achieved(
            tcp=scene.tcp_pos,
            object_pos=scene.object_pos,
            object_speed=np.asarray(scene.object_speed),
            touched=np.asarray(contacts.left or contacts.right or contacts.rest),
            grasped=np.asarray(contacts.left and contacts.right),
            held_steps=np.asarray(self._held_steps),
        )

    def _info(self, unsafe: dict[str, float], contacts: Contacts) -> dict[str, Any]:
        """Return success, goal, sub-goals, unsafe events of the step, and what no model may read."""
        achieved = self._achieved(contacts)
        return {
            "success": bool(self.task.success(achieved, self.episode.wanted)),
            "goal": _copy(self._goal),
            "subgoals": [_copy(subgoal) for subgoal in self._subgoals],
            "unsafe": unsafe,
            "cost": float(len(unsafe)),
            "privileged/object_pos": achieved.object_pos,
            "privileged/object_quat": self.scene.object_quat,
            "privileged/object_speed": float(achieved.object_speed),
            "privileged/tcp_pos": achieved.tcp,
            "privileged/opening": self.scene.opening,
            "privileged/command": self.controller.state.opening,
            "privileged/target_pos": self.episode.wanted.target.copy(),
            "privileged/touched": contacts.left or contacts.right,
            "privileged/grasped": bool(achieved.grasped),
            "privileged/held_steps": int(self._held_steps),
        }

    # State.

    def put(self, pose: Pose) -> None:
        """Put the simulator into a state of rest, with the gripper's command as the pose says, and let it settle."""
        joints = self.controller.joints_at(pose.tcp)
        self.scene.place(joints, pose.opening, pose.object_pos, pose.object_quat)
        self.controller.settle(pose.tcp, joints, pose.command)
        mujoco.mj_step(self.scene.model, self.scene.data, round(SETTLE_SECONDS / self.scene.model.opt.timestep))
        mujoco.mj_forward(self.scene.model, self.scene.data)
        self._held_steps = 0
        self._top = self.scene.object_pos[2]
        self._was_held = self._is_held(self.scene.contacts())

    def get_state(self) -> EnvState:
        """Return everything that the future depends on."""
        return EnvState(
            physics=self.scene.get_state(),
            control=self.controller.state,
            episode=self.episode,
            variation=self.variation,
            goal=self._goal,
            subgoals=self._subgoals,
            rng=self.np_random.bit_generator.state,
            steps=self._steps,
            held_steps=self._held_steps,
            was_held=self._was_held,
            top=self._top,
        )

    def set_state(self, state: EnvState) -> None:
        """Go to a state of `get_state`, of this or of another environment with the same config; exact."""
        if state.variation is not self.variation:
            self.randomizer.apply(state.variation)
        self.scene.set_state(state.physics)
        self.controller.state = state.control
        self.episode, self.variation = state.episode, state.variation
        self._goal, self._subgoals = state.goal, state.subgoals
        self.np_random.bit_generator.state = state.rng
        self._steps, self._held_steps = state.steps, state.held_steps
        self._was_held, self._top = state.was_held, state.top

    # What went wrong.

    def _is_held(self, contacts: Contacts) -> bool:
        spec = self.scene.spec
        return contacts.left and contacts.right and self.scene.object_pos[2] - spec.half_height >= LIFT

    def _unsafe(self, contacts: list[Contacts]) -> dict[str, float]:
        """Return what went wrong in a step, with the measured value: N, m or rad. Of forces, at the times of `contacts`: blows between go unseen."""
        unsafe, scene = {}, self.scene
        peak = max([c.object_force for c in contacts])
        if peak > OBJECT_FORCE_LIMIT:
            unsafe["object_force"] = peak
        peak = max([c.table_force for c in contacts])
        if peak > TABLE_FORCE_LIMIT:
            unsafe["table_force"] = peak
        peak = max([c.post_force for c in contacts])
        if peak > POST_FORCE_LIMIT:
            unsafe["post_force"] = peak
        if any(c.self_collision for c in contacts):
            unsafe["self_collision"] = max(c.self_force for c in contacts)
        height = float(scene.object_pos[2] - scene.spec.half_height)
        if height < -0.05:
            unsafe["off_table"] = height
        fallen = self._fallen(contacts[-1])
        if fallen > DROP_HEIGHT:
            unsafe["dropped"] = fallen
        limits = zip(scene.joints.tolist(), scene.model.jnt_range[:7].tolist())
        room = min([min(angle - low, high - angle) for angle, (low, high) in limits])
        if room < JOINT_MARGIN:
            unsafe["joint_limit"] = room
        return unsafe

    def _fallen(self, now: Contacts) -> float:
        """Return how far the object has fallen since a finger last touched it, m; told once, when it has come to rest."""
        height = float(self.scene.object_pos[2])
        if now.left or now.right:
            self._top = height
            return 0.0
        if self.scene.object_speed > 0.3:
            return 0.0
        fallen, self._top = self._top - height, min(self._top, height)
        return fallen

    def _checked(self, action: np.ndarray) -> np.ndarray:
        if self.episode is None:
            raise ValueError("the environment has no episode yet: call reset() before step()")
        action = np.asarray(action, float)
        if action.shape != (self.config.action_dim,):
            raise ValueError(f"action has shape {action.shape}: expected ({self.config.action_dim},)")
        if not np.isfinite(action).all():
            raise ValueError(f"action is {action}: expected finite numbers in [-1, 1]")
        return action.clip(-1.0, 1.0)
