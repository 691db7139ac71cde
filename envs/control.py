"""From actions in [-1, 1] to joint targets: differential inverse kinematics with mink.

The hand's target moves by at most 5 cm per step and axis; the joints' targets follow it within their limits. Joint limits and
velocity limits are Franka's published ones (FCI documentation, "Robot and interface specifications"); those of velocity hold in the mean
of a step, in which joints come to their targets in less than half of it. An action of 0 keeps the target where it is: up to LEASH beyond
what blocks the hand, and so pressing on it.
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
_PROFILE = np.array([0.3, 0.65, 1.0, 1.0, 1.0])
_LOOKS = (1, 2, 3)  # the parts after which contacts are looked at; the end of the step is the caller's


def euler_from_down(mat: np.ndarray) -> np.ndarray:
    """Extrinsic xyz Euler angles [3], rad, of a hand's orientation [3, 3] relative to straight down."""
    r = mat @ DOWN  # DOWN is its own inverse
    pitch = np.arcsin(min(max(-r[2, 0], -1.0), 1.0))
    return np.array([np.arctan2(r[2, 1], r[2, 2]), pitch, np.arctan2(r[1, 0], r[0, 0])])


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a rotation vector [3], rad."""
    quat, mat = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quat, vector / angle if angle > 0 else np.array([1.0, 0, 0]), angle)
    mujoco.mju_quat2Mat(mat, quat)
    return mat.reshape(3, 3)


class DifferentialIK:
    """The quadratic program of `mink.build_ik` for one hand and a posture, to the bit, in a third of its time.

    What stays the same from one program to the next is laid out once: Minimise x'Hx / 2 + f'x where Gx <= upper.
    """

    DAMPING = 1e-6

    def __init__(self, model: mujoco.MjModel) -> None:
        self.arm = mink.Configuration(model)
        self.hand = mink.FrameTask("tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-4)
        self.posture = mink.PostureTask(model, cost=1e-3)
        self.posture.set_target(HOME)
        self.limits = [mink.ConfigurationLimit(model), mink.VelocityLimit(model, VELOCITY_LIMITS)]
        k, nv = self.hand.k, model.nv
        self._jacobian, self._error = np.empty((k + nv, nv)), np.empty(k + nv)  # the hand's rows, then the posture's
        self._jacobian[k:] = np.diag(self.posture.cost)
        self._g = np.vstack([limit.compute_qp_inequalities(self.arm, 1.0).G for limit in self.limits])
        self._upper = np.empty(len(self._g))
        self._lower = np.full(len(self._g), -1e30)
        self._kinds = np.zeros(len(self._g), np.int32)  # of constraints: inequalities

    def program(self, dt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return H [7, 7], f [7], G [28, 7] and upper [28] for a step of `dt` seconds; they hold until the next call."""
        q, k, nv = self.arm.data.qpos, self.hand.k, self.arm.nv
        jacobian, error, upper = self._jacobian, self._error, self._upper
        jacobian[:k], error[:k], damping = self.hand.compute_qp_residual(self.arm)
        error[k:] = self.posture.cost * (self.posture.target_q - q)
        h = jacobian.T @ jacobian
        h.flat[:: nv + 1] += self.DAMPING + damping
        position, velocity = self.limits
        upper[:nv] = position.gain * (position.upper - q)
        upper[nv : 2 * nv] = position.gain * (q - position.lower)
        upper[2 * nv : 3 * nv] = upper[3 * nv :] = dt * velocity.limit
        return h, -(error @ jacobian), self._g, upper

    def solve(self, pos: np.ndarray, mat: np.ndarray, joints: np.ndarray, solves: int, dt: float) -> np.ndarray:
        """Return joints [7] that bring the tool centre point towards a pose, `solves` steps of `dt` seconds from `joints`."""
        arm, target = self.arm, np.empty(7)
        mujoco.mju_mat2Quat(target[:4], mat.ravel())
        target[4:] = pos
        self.hand.set_target(mink.SE3(target))
        arm.data.qpos[:] = joints
        for _ in range(solves):
            arm.update()
            h, f, g, upper = self.program(dt)
            x, _, flag, _ = daqp.solve(h, f, g, upper, self._lower, self._kinds)
            if flag <= 0:
                raise RuntimeError(f"inverse kinematics: daqp found no solution (exit flag {flag})")
            mujoco.mj_integratePos(arm.model, arm.data.qpos, x / dt, dt)
        return arm.q


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
        self._ik = DifferentialIK(model)
        self._substeps = round(STEP_SECONDS / len(_PROFILE) / scene.model.opt.timestep)
        self.state = ControlState(HOME, np.zeros(3), DOWN, MAX_OPENING)

    def joints_at(self, pos: np.ndarray) -> np.ndarray:
        """Return joints [7] that hold the hand straight down at `pos` [3], m; the same ones whatever went before."""
        return self._ik.solve(pos, DOWN, HOME, solves=8, dt=1.0)

    def hand_at(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the hand is, tool centre point [3], m, and orientation [3, 3], with `joints_at(pos)`."""
        self._ik.arm.update(self.joints_at(pos))
        hand = self._ik.arm.data.site("tcp")
        return hand.xpos.copy(), hand.xmat.reshape(3, 3).copy()

    def settle(self, pos: np.ndarray, joints: np.ndarray, opening: float) -> None:
        """Take a pose as the present target: hand straight down at `pos`, with the commanded opening in m."""
        self.state = ControlState(joints.copy(), np.array(pos, float), DOWN.copy(), float(opening))
        self._scene.data.ctrl[:7] = joints
        self._scene.data.ctrl[7] = opening

    def step(self, action: np.ndarray):
        """Run one action; yields at times on the way, so that the caller can look at contacts."""
        old = self.state
        new = self._next(old, action)
        model, data = self._scene.model, self._scene.data
        before, after = (np.append(state.joints, state.opening) for state in (old, new))
        for part, ctrl in enumerate(before + _PROFILE[:, None] * (after - before)):
            data.ctrl[:] = ctrl
            mujoco.mj_step(model, data, self._substeps)
            if part in _LOOKS:
                yield
        self.state = new

    def _next(self, old: ControlState, action: np.ndarray) -> ControlState:
        tcp = self._scene.tcp_pos
        held = tcp + (old.pos - tcp).clip(-LEASH, LEASH)
        pos = (held + MOVE * action[:3]).clip(*WORKSPACE)
        mat = old.mat
        if len(action) == 7:
            mat = rotation(TURN * action[3:6]) @ self._leashed(mat)
        joints = self._ik.solve(pos, mat, old.joints, solves=2, dt=STEP_SECONDS / 2)
        opening = min(max(float(old.opening + MAX_OPENING * action[-1]), 0.0), MAX_OPENING)
        return ControlState(joints, pos, mat, opening)

    def _leashed(self, mat: np.ndarray) -> np.ndarray:
        """Keep a target orientation within TURN_LEASH of the measured one."""
        measured = self._scene.tcp_mat
        quat, ahead = np.empty(4), np.empty(3)
        mujoco.mju_mat2Quat(quat, (mat @ measured.T).ravel())
        mujoco.mju_quat2Vel(ahead, quat, 1.0)
        angle = float(np.linalg.norm(ahead))
        return mat if angle <= TURN_LEASH else rotation(ahead * (TURN_LEASH / angle)) @ measured
