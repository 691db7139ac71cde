"""Benchmarks of others that are known by name (extra peers): what their goals are, and who plays in them.

visual-cube-single-v0 of OGBench: a UR5e with a Robotiq gripper, a cube of 4 cm, five tasks with starts and goals of their own,
of which seed s plays the one with the number 1 + s % 5; its own success counts, the cube within 4 cm of the goal. Sub-goals are
the cube held where it lies, and where it is to be; the last is the benchmark's own goal picture. To collect, starts and
targets are random all over the table (mode=data_collection).

FetchPickAndPlace-v4 of Gymnasium-Robotics: a Fetch arm whose hand hangs on a moving point, a block of 5 cm, and
a goal for it, half of the time in the air. Its own success counts: the block within 5 cm of the goal. A goal is a picture with
the block there, held, and the first of two sub-goals one with the block held where it lies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

Obs = Mapping[str, np.ndarray]
Policy = Callable[[Mapping[str, Any]], np.ndarray]

_BLOCK = 0.025  # m, half the edge of Fetch's block
_REACH = 0.05  # m per unit of action and step, of Fetch's and OGBench's hands
_TRIES = 100  # draws of a start and a goal that are far enough apart


@contextlib.contextmanager
def _undone(model: Any, data: Any) -> Iterator[None]:
    """Whatever is done to a MuJoCo state is undone in the end, to the bit."""
    import mujoco  # it takes long, and a command line asks this module who is known

    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    before = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, before, kind)
    try:
        yield
    finally:
        mujoco.mj_setState(model, data, before, kind)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, before, kind)  # mj_forward has touched the warm start


@contextlib.contextmanager
def _tried(env: gym.Env, model: Any, data: Any, settle: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Steps of an environment are undone in the end: all of MuJoCo's data, and numbers and arrays that its layers keep beside it.

    Gives what is to be called after each step.
    """
    import mujoco

    layers = [env]
    while layers[-1] is not env.unwrapped:
        layers.append(layers[-1].env)
    plain = (bool, int, float, np.ndarray)
    layers = [layer for layer in layers if not isinstance(layer, gym.wrappers.PassiveEnvChecker)]  # which counts calls
    kept = [{name: copy.copy(value) for name, value in vars(layer).items() if isinstance(value, plain)} for layer in layers]
    before = copy.copy(data)  # with what follows from the state, which hands that hang on a moving point read before a step
    try:
        yield settle
    finally:
        mujoco.mj_copyData(data, model, before)
        for layer, values in zip(layers, kept):
            vars(layer).update(values)


def coarsen(model: Any, grain: float) -> None:
    """Have a MuJoCo model's meshes drawn with fewer faces, before a renderer is made: vertices within a cell of `grain` m fall together.

    Nothing but the drawing knows these faces: contacts are those of convex hulls, which stay. Vertex clustering (Rossignac
    and Borrel, 1993).
    """
    for mesh in range(model.nmesh):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        cells = np.floor(model.mesh_vert[vertices] / grain).astype(int)
        _, first, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        begin, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        faces = first[cell.ravel()][model.mesh_face[begin : begin + count]]  # [faces, 3]
        ordered = np.sort(faces, 1)
        _, once = np.unique(ordered, axis=0, return_index=True)
        kept = np.sort(once[(np.diff(ordered[once], axis=1) > 0).all(1)])
        model.mesh_face[begin : begin + len(kept)] = faces[kept]
        for what in (model.mesh_facenormal, model.mesh_facetexcoord):
            what[begin : begin + len(kept)] = what[begin + kept]
        model.mesh_facenum[mesh] = len(kept)


class Fetch(gym.Wrapper):
    """FetchPickAndPlace whose gripper keeps to what it was last told, with pictures of goals and without the goal's mark.

    Starts are at least `least` m from their goals. What experts read is in info as privileged/*.
    """

    def __init__(self, env: gym.Env, least: float = 0.0) -> None:
        super().__init__(env)
        self._own, self._least, self._told = env.unwrapped, least, 1.0
        model = self._own.model
        model.site_rgba[:, 3] = 0.0  # the mark
        model.geom_rgba[model.geom_bodyid == model.body("robot0:mocap").id, 3] = 0.0  # axes of the point
        self._block = int(model.joint("object0:joint").qposadr[0])
        self._fingers = [int(model.joint(f"robot0:{side}_gripper_finger_joint").qposadr[0]) for side in "lr"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode. Raises ValueError where no goal is far enough."""
        self._told = 1.0
        for _ in range(_TRIES):
            obs, info = self.env.reset(seed=seed, options=options)
            seed = None  # the next draw goes on from this one
            if np.linalg.norm(obs["desired_goal"] - obs["achieved_goal"]) >= self._least:
                return obs, info | self._privileged(obs)
        raise ValueError(f"no goal of {_TRIES} is {self._least} m from its start; give a smaller least")

    def step(self, action: np.ndarray):
        """Run an action; one whose last number is within 0.5 of 0 leaves the gripper as it was told to be."""
        if abs(action[-1]) > 0.5:
            self._told = float(np.sign(action[-1]))
        obs, reward, terminated, truncated, info = self.env.step(np.append(action[:-1], self._told).astype(np.float32))
        return obs, reward, terminated, truncated, info | self._privileged(obs)

    def tried(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Steps inside are undone in the end; after each, one settles what a picture of it would have settled."""
        import mujoco

        model, data = self._own.model, self._own.data
        return _tried(self, model, data, lambda: mujoco.mj_forward(model, data))  # as its `render` does

    def goals(self, info: Mapping[str, Any]) -> list[Obs]:
        """The block held where it lies, and where it is to be; the present state stays exactly as it was."""
        return [self._held_at(info["privileged/object_pos"]), self._held_at(info["privileged/target_pos"])]

    def _privileged(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "privileged/hand": obs["observation"][:3], "privileged/object_pos": obs["achieved_goal"],
            "privileged/target_pos": obs["desired_goal"], "privileged/opening": obs["observation"][9:11].sum(),
        }  # fmt: skip

    def _held_at(self, place: np.ndarray) -> Obs:
        """A picture of the block in the closed hand at a place [3], and the proprioception there."""
        import mujoco

        own, model, data = self._own, self._own.model, self._own.data
        block = slice(self._block, self._block + 7)
        with _undone(model, data):
            data.qpos[block] = [0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0]  # out of the way
            own._utils.reset_mocap2body_xpos(model, data)
            data.mocap_pos[0] += place - data.site("robot0:grip").xpos
            for _ in range(30):  # which the hand follows
                data.qpos[block][:3] = [0.0, 0.0, -1.0]
                mujoco.mj_step(model, data, own.n_substeps)
            data.qpos[block] = [*place, 1.0, 0.0, 0.0, 0.0]
            data.qpos[self._fingers] = _BLOCK
            data.qvel[:] = 0.0
            mujoco.mj_forward(model, data)
            return {"pixels": self.env.render(), "proprio": fetch_proprio(own._get_obs())}


def fetch_proprio(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Place of the hand (m), and opening of the gripper (m): [4]."""
    seen = obs["observation"]
    return np.append(seen[:3], seen[9:11].sum())


class FetchExpert:
    """From above onto the block, close, to the goal, and stay; `noise`, `offset` and `drop` spoil it."""

    def __init__(self, skip: int, rng: np.random.Generator, noise: float = 0.0, offset: float = 0.0, drop: bool = False) -> None:
        self._rng, self._noise, self._step = rng, noise, _REACH * skip
        self._offset = rng.normal(0.0, offset, 3) * [1, 1, 0] if offset else np.zeros(3)
        self._drops_after = int(rng.integers(1, 6)) if drop else None
        self._closing = self._carried = 0
        self._down = False

    def __call__(self, info: Mapping[str, Any]) -> np.ndarray:
        """An action [4]."""
        hand, block = info["privileged/hand"], info["privileged/object_pos"] + self._offset
        aside, above = np.linalg.norm((hand - block)[:2]), hand[2] - block[2]
        grip = 1.0
        if self._closing:
            grip, self._closing = -1.0, self._closing + 1
            goal = hand
            if self._closing > 3:
                goal, self._carried = info["privileged/target_pos"], self._carried + 1
            if self._drops_after is not None and self._carried > self._drops_after:
                grip = 1.0
            if self._carried > 2 and np.linalg.norm(hand - block) > 0.06 and self._drops_after is None:  # lost
                self._closing, self._carried, self._down = 0, 0, False
        elif self._down or aside < 0.012:
            self._down, goal = True, block
            if above < 0.012:
                self._closing, grip = 1, -1.0
        else:
            goal = block + [0.0, 0.0, 0.08]
        motion = (goal - hand) / self._step + self._noise * self._rng.normal(size=3)
        return np.append(motion.clip(-1, 1), grip).astype(np.float32)


class Cube(gym.Wrapper):
    """OGBench's single cube, with actions dx dy dz yaw gripper whose gripper opens with +1 and keeps to what it was last told.

    Observations are {"proprio"}: place of the fingers' middle (m), cosine and sine of their yaw, opening (m); pictures are
    drawn when they are asked for, by `render`.
    """

    CONTROLS = 12  # control steps in which fingers close
    SHADOWS = 1024  # pixels of the map that shadows are drawn from, instead of 4096
    GRAIN = 0.004  # m, half a pixel: detail of meshes that is not drawn. Both make a picture three to four times as fast

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._own, self._told, self._collects = env.unwrapped, 1.0, env.unwrapped._mode == "data_collection"
        self._begins = False
        self.observation_space = gym.spaces.Dict({"proprio": gym.spaces.Box(-np.inf, np.inf, (6,), np.float64)})
        draw = self._own.compute_observation
        self._own.compute_observation = lambda: draw() if self._begins else None  # which takes longer than a step
        self._draws, self._own._initialize_renderer = self._own._initialize_renderer, self._begin_to_draw

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode: of a seed's task, or of random places."""
        self._told = 1.0
        if not self._collects and seed is not None:
            options = {"task_id": 1 + seed % 5, **(options or {})}
        rng, step = np.random.default_rng(seed), self._own.step
        self._own.step = lambda action: step(rng.uniform(-1, 1, len(action)))  # with which it stirs its goals, unseeded
        self._begins = True
        try:
            _, info = self.env.reset(seed=seed, options=options)
        finally:
            self._begins = False
            del self._own.step
        return self._seen(info), self._info(info)

    def step(self, action: np.ndarray):
        """Run an action; one whose last number is within 0.5 of 0 leaves the gripper as it was told to be."""
        if abs(action[-1]) > 0.5:
            self._told = float(np.sign(action[-1]))
        _, reward, terminated, truncated, info = self.env.step(np.append(action[:-1], -self._told))
        return self._seen(info), reward, terminated, truncated, self._info(info) | {"success": info["success"]}

    def _begin_to_draw(self) -> None:
        self._own._model.vis.quality.shadowsize = self.SHADOWS
        coarsen(self._own._model, self.GRAIN)
        self._draws()

    def close(self) -> None:
        """Free the GL context, which it keeps beyond GL's own end."""
        if self._own._renderer is not None:
            self._own._renderer.close()
            self._own._renderer = None
        self.env.close()

    def tried(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Steps inside are undone in the end; pictures settle nothing here."""
        return _tried(self, self._own._model, self._own._data, lambda: None)

    def goals(self, info: Mapping[str, Any]) -> list[Obs]:
        """The cube held where it lies, held at its target, and the benchmark's goal; the present state stays as it was."""
        held = [self._held_at(info["privileged/object_pos"], info["privileged/yaw"]), self._held_at(info["privileged/target_pos"], 0.0)]
        return held if self._collects else [*held, {"pixels": info["goal"]}]

    def _info(self, info: Mapping[str, Any]) -> dict[str, Any]:
        own = self._own
        out = {
            "privileged/hand": info["proprio/effector_pos"], "privileged/hand_yaw": float(info["proprio/effector_yaw"][0]),
            "privileged/object_pos": info["privileged/block_0_pos"], "privileged/yaw": float(info["privileged/block_0_yaw"][0]),
            "privileged/target_pos": own._data.mocap_pos[own._cube_target_mocap_ids[0]].copy(),
        }  # fmt: skip
        return out | ({"goal": info["goal"]} if "goal" in info else {})

    def _seen(self, info: Mapping[str, Any]) -> dict[str, np.ndarray]:
        yaw, closed = info["proprio/effector_yaw"][0], info["proprio/gripper_opening"][0]
        return {"proprio": np.array([*info["proprio/effector_pos"], np.cos(yaw), np.sin(yaw), 0.085 * (1 - closed)])}

    def _held_at(self, place: np.ndarray, yaw: float) -> Obs:
        """The cube between closed fingers at a place [3], turned by an angle."""
        import mujoco
        from ogbench.manipspace import lie

        own, model, data = self._own, self._own._model, self._own._data
        turn = (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4  # fingers fit any two of its sides
        pose = lie.SE3.from_rotation_and_translation(lie.SO3.from_z_radians(turn) @ own._effector_down_rotation, np.array(place, float))
        attach = pose @ own._T_pa
        joints = own._ik.solve(pos=attach.translation(), quat=attach.rotation().wxyz, curr_qpos=own._home_qpos)
        with _undone(model, data):
            data.qpos[own._arm_joint_ids] = joints
            data.joint("object_joint_0").qpos[:] = [*place, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
            data.qvel[:] = 0.0
            data.ctrl[own._arm_actuator_ids], data.ctrl[own._gripper_actuator_ids] = joints, 255.0
            mujoco.mj_step(model, data, nstep=self.CONTROLS * own._n_steps)
            return {"pixels": own.render(), **self._seen(own.compute_ob_info())}


class CubeExpert:
    """From above onto the cube, close, up, across, down, open, up, and away; `noise`, `jolts`, `offset` and `drop` spoil it.

    It comes down the more the nearer it is, onto the cube and with it onto the target: who imitates it may be anywhere, and from
    nowhere is the way down far from what was shown. In the end it goes anywhere, as the arm is in the benchmark's goal pictures:
    where the cube is, these tell by the cube alone. It never waits: who imitates it, and sees one picture, could not tell how
    long it has waited. `noise` is a share of each motion, `jolts` how often a step goes astray, from which it finds back.
    """

    HIGH = 0.12  # m over the table, where it crosses
    AWAY = np.array([[0.25, -0.35, 0.2], [0.6, 0.35, 0.35]])  # m, corners of where it goes in the end: where the benchmark's arm begins
    GAIN = 1.6  # of motions, of which the hand goes 0.4 within a step
    JOLT = 0.05  # m, standard deviation

    def __init__(
        self, skip: int, rng: np.random.Generator, noise: float = 0.0, offset: float = 0.0, drop: bool = False, jolts: float = 0.0
    ) -> None:
        self._rng, self._noise, self._jolts, self._step = rng, noise, jolts, _REACH * skip
        self._offset = rng.normal(0.0, offset, 3) * [1, 1, 0] if offset else np.zeros(3)
        self._drops_after = int(rng.integers(1, 6)) if drop else None
        self._phase, self._count = "approach", 0
        self._away = rng.uniform(*self.AWAY)

    def __call__(self, info: Mapping[str, Any]) -> np.ndarray:
        """An action [5]."""
        hand, cube, target = info["privileged/hand"], info["privileged/object_pos"] + self._offset, info["privileged/target_pos"]
        turn = (info["privileged/yaw"] - info["privileged/hand_yaw"] + np.pi / 4) % (np.pi / 2) - np.pi / 4
        goal, grip = self._go(hand, cube, target, abs(turn))
        self._count += 1
        motion = self.GAIN * (goal - hand) / self._step
        motion = motion + self._noise * max(0.1, *map(abs, motion)) * self._rng.normal(size=3)
        if self._jolts and self._phase in ("approach", "carry", "leave", "away") and self._rng.random() < self._jolts:
            motion = motion + self._rng.normal(size=3) * (self.GAIN * self.JOLT / self._step)
        turning = turn / 0.3 if self._phase == "approach" else 0.0
        return np.array([*motion, turning, grip]).clip(-1, 1).astype(np.float32)

    def _go(self, hand: np.ndarray, cube: np.ndarray, target: np.ndarray, turn: float) -> tuple[np.ndarray, float]:
        """Where to, m, of a hand that is to turn by so much, and what the gripper is told; moves on to the next phase where this one is done."""
        if self._phase == "approach" and (self._is_at(hand, cube) or self._count > 20):  # something is in the way
            self._next("close")
        elif self._phase == "close" and self._count > 0:
            self._next("carry")
        elif self._phase == "carry" and self._is_at(hand, target):
            self._next("open")
        elif self._phase == "open" and self._count > 0:
            self._next("leave")
        elif self._phase == "leave" and hand[2] > self.HIGH:
            self._next("away")
        elif self._phase == "carry" and self._drops_after is None and np.linalg.norm(hand - cube) > 0.06:
            self._next("approach")  # lost
        if self._phase == "carry" and self._drops_after is not None and self._count > self._drops_after:
            self._next("leave")
        return {
            "approach": (self._funnel(hand, cube, 0.03, 0.04 * turn), 1.0), "close": (hand, -1.0), "carry": (self._funnel(hand, target, 0.08), -1.0),
            "open": (hand, 1.0), "leave": (np.array([*hand[:2], self.HIGH + 0.1]), 1.0), "away": (self._away, 1.0),
        }[self._phase]  # fmt: skip

    def _is_at(self, hand: np.ndarray, place: np.ndarray) -> bool:
        """Whether the hand has come down onto a place."""
        return hand[2] - place[2] < 0.01 and np.linalg.norm((hand - place)[:2]) < 0.015

    def _funnel(self, hand: np.ndarray, place: np.ndarray, wide: float, off: float = 0.0) -> np.ndarray:
        """Where to go, m, to come down onto a place from wherever the hand is: the higher, the further aside, m; first up, then across.

        Its foot is flat, since hands lag: who is told of too small a motion stays where it is.
        """
        aside = np.linalg.norm((hand - place)[:2]) + off - 0.01
        height = place[2] + (self.HIGH - place[2]) * float(np.clip(aside / wide, 0.0, 1.0))
        return np.array([*(hand if hand[2] < height - 0.03 else place)[:2], height])

    def _next(self, phase: str) -> None:
        self._phase, self._count = phase, 0


def maker_of(expert: Callable[..., Policy], noisy: Mapping[str, float]) -> Callable[[str, int, np.random.Generator], Policy]:
    """Makes the expert, a noisy one, or a mixture that is drawn anew for each episode: experts that are noisy, miss, or drop."""

    def make(name: str, skip: int, rng: np.random.Generator) -> Policy:
        if name != "mixture":
            return expert(skip, rng, **(noisy if name == "noisy" else {}))
        kinds = {"noise": float(rng.uniform(0.1, 0.5))}, {"noise": 0.2, "offset": 0.03}, {"noise": 0.2, "drop": True}
        return expert(skip, rng, **kinds[rng.choice(3, p=[0.6, 0.25, 0.15])])

    return make


@dataclass(frozen=True)
class Ready:
    """How an environment of others becomes like ours."""

    module: str  # that registers it
    kwargs: dict[str, Any]  # for gym.make, unless others are given
    wrap: Callable[[gym.Env, float], gym.Env]  # of the environment, and the least distance of goals; it has `goals`
    proprio: Callable[[Any], np.ndarray]  # of its observation
    player: Callable[[str, int, np.random.Generator], Policy]  # expert, noisy or mixture, for a frame skip
    subgoal_steps: tuple[int, ...]  # with its frame skip in the presets
    heeds: tuple[str, ...] = ("frame_skip",)  # fields of Foreign that mean something here, beside id and kwargs
    to_collect: Mapping[str, Any] | None = None  # more for gym.make, where no goals are wanted


READY: dict[str, Ready] = {  # by id, without the module
    "FetchPickAndPlace-v4": Ready(
        "gymnasium_robotics",
        {"max_episode_steps": -1, "render_mode": "rgb_array", "width": 192, "height": 192, "default_camera_config": {
            "distance": 1.1, "azimuth": 155.0, "elevation": -22.0, "lookat": np.array([1.36, 0.75, 0.6])}},
        Fetch, fetch_proprio, maker_of(FetchExpert, {"noise": 0.3}), (12, 12), ("frame_skip", "least"),
    ),
    "visual-cube-single-v0": Ready(
        "ogbench",
        {"max_episode_steps": 10_000, "disable_env_checker": True, "render_mode": "rgb_array", "terminate_at_goal": False,
         "width": 96, "height": 96},
        lambda env, least: Cube(env), lambda obs: obs["proprio"], maker_of(CubeExpert, {"jolts": 0.15}), (14, 14, 14),
        to_collect={"mode": "data_collection"},
    ),
}  # fmt: skip
