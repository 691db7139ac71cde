"""From actions in [-1, 1] to joint targets: differential inverse kinematics with mink.

The hand's target moves by at most 5 cm per step and axis; the joints' targets follow it within their limits. Joint limits and
velocity limits are Franka's published ones (FCI documentation, "Robot and interface specifications").
"""

from __future__ import annotations

from dataclasses import dataclass

import daqp
import mink
import mujoco
import numpy as np

from envs.scene import ASSETS, HOME, Scene

STEP_SECONDS = 0.2
MOVE = 0.05  # m per unit of action and step
TURN = 0.25  # rad per unit of action and step
MAX_OPENING = 0.08  # m; one unit of the gripper's action is the whole way
WORKSPACE = np.array([[0.40, -0.16, 0.015], [0.60, 0.16, 0.24]])  # m; where the tool centre point may be sent
LEASH = 0.015  # m; how far the target may be ahead of the measured hand when something blocks it
TURN_LEASH = 0.1  # rad
DOWN = np.diag([1.0, -1.0, -1.0])  # orientation of the hand when it points straight down
VELOCITY_LIMITS = dict(zip((f"joint{i}" for i in range(1, 8)), (2.175,) * 4 + (2.61,) * 3, strict=True))  # rad/s
# Where the joints' targets are on the way to the new ones, at the start of each of the equal parts of a step.
_PROFILE = (0.3, 0.65, 1.0, 1.0, 1.0)
_LOOKS = (1, 2, 3)  # the parts after which contacts are looked at; the end of the step is the caller's


def euler_from_down(mat: np.ndarray) -> np.ndarray:
    """Extrinsic xyz Euler angles [3], rad, of a hand's orientation [3, 3] relative to straight down."""
    r = mat @ DOWN  # DOWN is its own inverse
    pitch = np.arcsin(np.clip(-r[2, 0], -1.0, 1.0))
    return np.array([np.arctan2(r[2, 1], r[2, 2]), pitch, np.arctan2(r[1, 0], r[0, 0])])


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a rotation vector [3], rad."""
    quat, mat = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quat, vector / angle if angle > 0 else np.array([1.0, 0, 0]), angle)
    mujoco.mju_quat2Mat(mat, quat)
    return mat.reshape(3, 3)


def _minimum(h: np.ndarray, f: np.ndarray, g: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Minimise x'Hx / 2 + f'x where Gx <= upper; what mink.solve_ik does, in half the time."""
    free = np.zeros(len(upper), np.int32)
    x, _, flag, _ = daqp.solve(h, f, g, upper, np.full(len(upper), -1e30), free)
    if flag <= 0:
        raise RuntimeError(f"inverse kinematics: daqp found no solution (exit flag {flag})")
    return x


@dataclass(frozen=True)
class ControlState:
    """What the controller remembers between steps."""

    joints: np.ndarray  # [7] joint targets, rad
    pos: np.ndarray  # [3] target of the tool centre point, m
    mat: np.ndarray  # [3, 3] target orientation
    opening: float  # commanded opening, m


class Controller:
    """Moves the hand of a scene by actions.

    An action is [dx, dy, dz, gripper] or [dx, dy, dz, rx, ry, rz, gripper], each in [-1, 1], in the base's frame: MOVE metres,
    TURN radians (a rotation vector), and a change of the commanded opening by MAX_OPENING metres per unit.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        spec = mujoco.MjSpec.from_file(str(ASSETS / "panda.xml"))
        for item in [*spec.actuators, *spec.equalities, *spec.tendons, spec.body("finger_left"), spec.body("finger_right")]:
            spec.delete(item)
        model = spec.compile()
        self._arm = mink.Configuration(model)
        self._hand = mink.FrameTask("tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-4)
        self._posture = mink.PostureTask(model, cost=1e-3)
        self._posture.set_target(HOME)
        self._limits = [mink.ConfigurationLimit(model), mink.VelocityLimit(model, VELOCITY_LIMITS)]
        self._substeps = round(STEP_SECONDS / len(_PROFILE) / scene.model.opt.timestep)
        self.state = ControlState(HOME, np.zeros(3), DOWN, MAX_OPENING)

    def solve(self, pos: np.ndarray, mat: np.ndarray, joints: np.ndarray, solves: int, dt: float) -> np.ndarray:
        """Return joints [7] that bring the tool centre point towards a pose, `solves` steps of `dt` seconds from `joints`."""
        self._arm.update(joints)
        self._hand.set_target(mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(mat), pos))
        for _ in range(solves):
            qp = mink.build_ik(self._arm, [self._hand, self._posture], dt, damping=1e-6, limits=self._limits)
            self._arm.integrate_inplace(_minimum(qp.P, qp.q, qp.G, qp.h) / dt, dt)
        return self._arm.q.copy()

    def joints_at(self, pos: np.ndarray) -> np.ndarray:
        """Return joints [7] that hold the hand straight down at `pos` [3], m; the same ones whatever went before."""
        return self.solve(pos, DOWN, HOME, solves=8, dt=1.0)

    def settle(self, pos: np.ndarray, joints: np.ndarray, opening: float) -> None:
        """Take a pose as the present target: hand straight down at `pos`, with the commanded opening in m."""
        self.state = ControlState(joints.copy(), np.array(pos, float), DOWN.copy(), float(opening))
        self._scene.data.ctrl[:7] = joints
        self._scene.data.ctrl[7] = opening

    def step(self, action: np.ndarray):
        """Run one action; yields at times on the way, so that the caller can look at contacts."""
        old = self.state
        new = self._next(old, action)
        ctrl = self._scene.data.ctrl
        for part, fraction in enumerate(_PROFILE):
            ctrl[:7] = old.joints + fraction * (new.joints - old.joints)
            ctrl[7] = old.opening + fraction * (new.opening - old.opening)
            mujoco.mj_step(self._scene.model, self._scene.data, self._substeps)
            if part in _LOOKS:
                yield
        self.state = new

    def _next(self, old: ControlState, action: np.ndarray) -> ControlState:
        tcp = self._scene.tcp_pos
        held = tcp + np.clip(old.pos - tcp, -LEASH, LEASH)
        pos = np.clip(held + MOVE * action[:3], WORKSPACE[0], WORKSPACE[1])
        mat = old.mat
        if len(action) == 7:
            mat = rotation(TURN * action[3:6]) @ self._leashed(mat)
        joints = self.solve(pos, mat, old.joints, solves=2, dt=STEP_SECONDS / 2)
        opening = float(np.clip(old.opening + MAX_OPENING * action[-1], 0.0, MAX_OPENING))
        return ControlState(joints, pos, mat, opening)

    def _leashed(self, mat: np.ndarray) -> np.ndarray:
        """Keep a target orientation within TURN_LEASH of the measured one."""
        measured = self._scene.tcp_mat
        quat, ahead = np.empty(4), np.empty(3)
        mujoco.mju_mat2Quat(quat, (mat @ measured.T).ravel())
        mujoco.mju_quat2Vel(ahead, quat, 1.0)
        angle = float(np.linalg.norm(ahead))
        return mat if angle <= TURN_LEASH else rotation(ahead * (TURN_LEASH / angle)) @ measured
