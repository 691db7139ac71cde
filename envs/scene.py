"""The MuJoCo scene: model, pictures, contacts, and the whole state of the physics.

Frame: the robot's base at the origin, x forward, y left, z up, the table's top at z = 0. Metres, radians, quaternions wxyz.
"""

from __future__ import annotations

import atexit
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from envs.gl import REMEDY

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CAMERAS = ("front", "side", "wrist")
HOME = np.array([0.0, 0.1, 0.0, -2.4, 0.0, 2.5, np.pi / 4])  # hand straight down at about (0.50, 0, 0.17)
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_ROBOT, _LEFT, _RIGHT, _TABLE, _OBJECT, _POST, _OTHER = range(7)  # kinds of geom
_KINDS = 7
_TOUCH = 0.0005  # m
_UNSEEN = 5  # group of geoms that are not drawn
_DRAWN = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # groups that are
_SHADOW, _SHADOW_HEIGHT = np.array([0, 0, 0, 0.25], np.float32), 0.0005  # rgba; m, over the table and of its thickness
_CORNERS = np.array(list(itertools.product((-1, 1), repeat=3)))  # of a cube [8, 3]


@dataclass(frozen=True)
class ObjectSpec:
    """What an expert and a goal need to know of an object.

    `half_height`: of its origin over the table when it stands, m. `width`: between the fingers, m.
    `grasp_height`: of the tool centre point over the object's origin, m. `max_yaw`: of a start, rad.
    """

    half_height: float
    width: float
    grasp_height: float
    max_yaw: float


OBJECTS = {
    "box": ObjectSpec(half_height=0.0225, width=0.045, grasp_height=0.0, max_yaw=np.deg2rad(25.0)),
    "cup": ObjectSpec(half_height=0.035, width=0.050, grasp_height=0.012, max_yaw=np.pi),
    "can": ObjectSpec(half_height=0.030, width=0.040, grasp_height=0.008, max_yaw=np.pi),  # in no training data
}


class Contacts(NamedTuple):
    """Who touches whom, and how hard, at one instant. Forces are sums of normal forces, N."""

    left: bool  # left finger and object
    right: bool  # right finger and object
    object_force: float  # the largest of: left finger, right finger, rest of the robot, table, on the object; distractors, which nothing moves, do not count
    table_force: float  # robot on the table, or object on the table, whichever is larger
    self_force: float  # robot on robot
    post_force: float  # robot and object on posts
    self_collision: bool
    rest: bool  # rest of the robot and object


_OWN = tuple(_ROBOT * _KINDS + kind for kind in (_ROBOT, _LEFT, _RIGHT))  # pairs: the robot and itself
_ON_OBJECT = [kind * _KINDS + _OBJECT for kind in (_ROBOT, _LEFT, _RIGHT, _TABLE)]
_ON_TABLE = [kind * _KINDS + _TABLE for kind in (_ROBOT, _LEFT, _RIGHT)]
_ON_POST = [kind * _KINDS + _POST for kind in (_ROBOT, _LEFT, _RIGHT, _OBJECT)]
_NO_CONTACTS = Contacts(False, False, 0.0, 0.0, 0.0, 0.0, False, False)
_WRIST_NEAR = 0.01  # m
POSTS, POST_HEIGHT, POST_RADIUS = 3, 0.08, 0.012  # how many there are, and m, as in scene.xml


def yaw_quat(yaw: float) -> np.ndarray:
    """Return the quaternion [4] (wxyz) of a turn by `yaw` about z."""
    return np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])


class Renderer:
    """Draws pictures of a model: `mujoco.Renderer`, with what is the same in all of them made once."""

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=2 * model.ngeom + 1)
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._all = int(mujoco.mjtCatBit.mjCAT_ALL)
        self._rect = mujoco.MjrRect(0, 0, size, size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[int(flag)] = 0
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        felt = (model.geom_contype != 0) & (model.geom_bodyid != 0)
        near = [model.geom(i).name.startswith(("object", "hand", "finger", "distractor", "post")) for i in range(model.ngeom)]
        self._casters = np.flatnonzero(felt & near).tolist()

    def draw(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """Return what a camera sees, uint8 [size, size, 3]."""
        self._camera.fixedcamid = camera
        near = self._model.vis.map.znear
        if self._model.cam_bodyid[camera]:  # on the hand: what the fingers hold is closer than what the others may see
            self._model.vis.map.znear = _WRIST_NEAR / self._model.stat.extent
        mujoco.mjv_updateScene(self._model, data, self._option, self._perturb, self._camera, self._all, self._scene)
        self._model.vis.map.znear = near
        self._cast(data)
        self._gl.make_current()
        mujoco.mjr_render(self._rect, self._scene, self._context)
        upside_down = np.empty((self._rect.height, self._rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(upside_down, None, self._rect, self._context)
        return upside_down[::-1].copy()

    def _cast(self, data: mujoco.MjData) -> None:
        """Lay shadows on the table: hand, fingers and things once more, black, flattened along the light.

        A picture without shadows hides how high a thing is; MuJoCo's shadow maps make it three times as dear.
        """
        light = data.light_xdir[0]
        flat = np.eye(3)
        flat[:2, 2] = -light[:2] / light[2]  # a point goes to where the light through it meets z = 0
        flat[2, 2] = _SHADOW_HEIGHT
        for geom in self._casters:
            place = data.geom_xpos[geom]
            if place[2] < 0:
                continue
            copy = self._scene.geoms[self._scene.ngeom]
            mat = flat @ data.geom_xmat[geom].reshape(3, 3)
            place = flat @ place
            place[2] = _SHADOW_HEIGHT
            mujoco.mjv_initGeom(copy, self._model.geom_type[geom], self._model.geom_size[geom], place, mat.ravel(), _SHADOW)
            self._scene.ngeom += 1

    def close(self) -> None:
        """Free the GL context."""
        self._gl.free()
        self._context.free()


class Scene:
    """Robot, table, one object, and the means to look at them.

    Nothing is shared between two scenes. The GL context is made by the first call of `render`.
    """

    def __init__(self, object: str, image_size: int, cameras: tuple[str, ...]) -> None:
        spec = mujoco.MjSpec.from_file(str(ASSETS / f"{object}.xml"))
        spec.visual.global_.offwidth = spec.visual.global_.offheight = max(image_size, 64)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.spec = OBJECTS[object]
        self.image_size, self.cameras = image_size, cameras
        self._renderer: Renderer | None = None
        self._tcp = self.model.site("tcp").id
        self._object = self.model.body("object").id
        self._qpos = int(self.model.joint("object").qposadr[0])
        self._qvel = int(self.model.joint("object").dofadr[0])
        kind = np.array([self._geom_kind(i) for i in range(self.model.ngeom)])
        self._things, self._robot = np.flatnonzero(kind == _OBJECT), np.flatnonzero(np.isin(kind, (_ROBOT, _LEFT, _RIGHT)))
        self._pair = (np.minimum(kind[:, None], kind) * _KINDS + np.maximum(kind[:, None], kind)).tolist()  # [geom][geom]
        self._groups = self.model.geom_group.copy()
        bound = self.model.geom_rbound
        self._reach = np.where(bound == 0, np.inf, bound + 1e-3)  # m, of a geom around its middle; 0: a plane has no end
        self._camera_ids = {name: self.model.camera(name).id for name in CAMERAS}
        self._state_size = mujoco.mj_stateSize(self.model, _STATE)
        self._home = np.zeros(self._state_size)
        mujoco.mj_getState(self.model, self.data, self._home, _STATE)

    def _geom_kind(self, geom: int) -> int:
        name = self.model.geom(geom).name
        named = {"finger_left": _LEFT, "finger_right": _RIGHT, "table": _TABLE}
        if name in named:
            return named[name]
        if name.startswith(("link", "hand")):
            return _ROBOT
        return _OBJECT if name.startswith("object") else _POST if name.startswith("post") else _OTHER

    # What is measured.

    @property
    def joints(self) -> np.ndarray:
        """Arm joint angles [7], rad."""
        return self.data.qpos[:7].copy()

    @property
    def tcp_pos(self) -> np.ndarray:
        """Tool centre point [3], m."""
        return self.data.site_xpos[self._tcp].copy()

    @property
    def tcp_mat(self) -> np.ndarray:
        """Orientation of the hand [3, 3]; its z axis points where the fingers point."""
        return self.data.site_xmat[self._tcp].reshape(3, 3).copy()

    @property
    def opening(self) -> float:
        """Distance between the fingers, m."""
        return float(self.data.qpos[7] + self.data.qpos[8])

    @property
    def object_pos(self) -> np.ndarray:
        """Origin of the object [3], m."""
        return self.data.qpos[self._qpos : self._qpos + 3].copy()

    @property
    def object_quat(self) -> np.ndarray:
        """Orientation of the object [4], wxyz."""
        return self.data.qpos[self._qpos + 3 : self._qpos + 7].copy()

    @property
    def object_speed(self) -> float:
        """Speed of the object's origin, m/s."""
        velocity = self.data.qvel[self._qvel : self._qvel + 3]
        return math.sqrt(velocity.dot(velocity))

    def contacts(self) -> Contacts:
        """Read the contacts of the last forward pass."""
        data = self.data
        if data.ncon == 0:
            return _NO_CONTACTS
        contact, forces = data.contact, data.efc_force.tolist()
        force, touch = [0.0] * _KINDS**2, set()
        # Plain lists: there are a few contacts, and this runs four times a step.
        for (one, other), address, dist in zip(
            contact.geom.tolist(), contact.efc_address.tolist(), contact.dist.tolist()
        ):
            pair = self._pair[one][other]
            if address >= 0:  # elliptic cone: the first row of a contact is its normal; -1: no force
                force[pair] += forces[address]
            if dist < _TOUCH:
                touch.add(pair)
        on_object, on_table = [force[pair] for pair in _ON_OBJECT], [force[pair] for pair in _ON_TABLE]
        return Contacts(
            left=_LEFT * _KINDS + _OBJECT in touch,
            right=_RIGHT * _KINDS + _OBJECT in touch,
            object_force=max(on_object),
            table_force=max(sum(on_table), force[_TABLE * _KINDS + _OBJECT]),
            self_force=sum([force[pair] for pair in _OWN]),
            post_force=sum([force[pair] for pair in _ON_POST]),
            self_collision=not touch.isdisjoint(_OWN),
            rest=_ROBOT * _KINDS + _OBJECT in touch,
        )

    # What is put.

    def reset(self) -> None:
        """Put everything where the XML has it."""
        mujoco.mj_setState(self.model, self.data, self._home, _STATE)

    def place(self, joints: np.ndarray, opening: float, object_pos: np.ndarray, object_quat: np.ndarray) -> None:
        """Put arm, fingers and object, at rest, and bring what follows from them (positions, contacts) up to date."""
        data, at = self.data, self._qpos
        data.qpos[:7] = joints
        data.qpos[7:9] = opening / 2
        data.qpos[at : at + 3] = object_pos
        data.qpos[at + 3 : at + 7] = object_quat
        data.qvel[:] = 0
        data.qacc_warmstart[:] = 0
        mujoco.mj_forward(self.model, data)

    def put_posts(self, places: np.ndarray) -> None:
        """Stand posts on the table at `places` [n, 2], m; the others are parked."""
        for i in range(POSTS):
            at = self.model.body(f"post{i}").mocapid[0]
            self.data.mocap_pos[at] = [*places[i], POST_HEIGHT / 2] if i < len(places) else self.model.body(f"post{i}").pos

    def get_state(self) -> np.ndarray:
        """Return the whole state of the physics, warm start included, so that what follows is bit-equal."""
        state = np.empty(self._state_size)
        mujoco.mj_getState(self.model, self.data, state, _STATE)
        return state

    def set_state(self, state: np.ndarray) -> None:
        """Undo of `get_state`; what follows from the state (positions, contacts) is brought up to date."""
        mujoco.mj_setState(self.model, self.data, state, _STATE)
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, state, _STATE)  # mj_forward has touched the warm start

    # Pictures.

    def render(self, cameras: tuple[str, ...] | None = None) -> np.ndarray:
        """Draw the present state: uint8 [size, size * views, 3], the views side by side.

        Raises RuntimeError, naming the remedy, where there is no GL library.
        """
        if self._renderer is None:
            self._renderer = self._make_renderer()
            self._free = weakref.finalize(self, self._renderer.close)
            atexit.register(self._free)  # by itself it may come after GL's own end
        views = []
        for camera in cameras or self.cameras:
            self.model.geom_group[:] = np.where(self._in_view(camera), self._groups, _UNSEEN)
            views.append(self._renderer.draw(self.data, self._camera_ids[camera]))
        return views[0] if len(views) == 1 else np.concatenate(views, axis=1)

    def film(self, qpos: np.ndarray) -> np.ndarray:
        """Draw the scene as it was at generalised positions [n, nq]: uint8 [n, size, size * views, 3]; its state stays.

        Pictures are the same as those drawn on the way, in less time: physics and drawing take turns less often at
        driving each other out of the processor's caches.
        """
        return np.stack([self.render() for _ in self._through(qpos)])

    def object_pixels(self, qpos: np.ndarray) -> np.ndarray:
        """Count the pixels, of all views, that show the object at positions [n, nq]: int [n]; the state stays.

        By rays through the pixels' middles: that needs no drawing, and holds whatever the colours.
        """
        return np.array([sum(self._pixels_in(camera) for camera in self.cameras) for _ in self._through(qpos)])

    def layout(self, qpos: np.ndarray, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Tell which pixels show the robot, and which the object, at positions [n, nq]; the state stays.

        Two of bool [n, size / every, size / every * views]: of every so many rows and columns.
        """
        at = np.arange(every // 2, self.image_size, every)
        rows, columns = np.meshgrid(at, at, indexing="ij")
        frames = []
        for _ in self._through(qpos):
            views = [self._first(camera, rows.ravel(), columns.ravel()).reshape(rows.shape) for camera in self.cameras]
            frames.append(np.concatenate(views, 1))
        geoms = np.stack(frames)
        return np.isin(geoms, self._robot), np.isin(geoms, self._things)

    def _through(self, qpos: np.ndarray) -> Iterator[None]:
        """Go through positions [n, nq], to look at the scene there, and back to where it was."""
        before = self.get_state()
        try:
            for positions in qpos:
                self.data.qpos[:] = positions
                mujoco.mj_kinematics(self.model, self.data)
                mujoco.mj_camlight(self.model, self.data)
                yield
        finally:
            self.set_state(before)

    def _pixels_in(self, camera: str) -> int:
        model, data, i, size = self.model, self.data, self._camera_ids[camera], self.image_size
        place = (data.geom_xpos[self._things] - data.cam_xpos[i]) @ data.cam_xmat[i].reshape(3, 3)  # [g, 3]: right, up, back
        cube = place[:, None] + model.geom_rbound[self._things][:, None, None] * _CORNERS
        scale = self._focal(camera) / np.maximum(-cube[..., 2], 1e-3)
        row, column = size / 2 - scale * cube[..., 1], size / 2 + scale * cube[..., 0]
        low = np.clip(np.floor([row.min(), column.min()]), 0, size).astype(int)
        high = np.clip(np.ceil([row.max(), column.max()]), 0, size).astype(int)
        rows, columns = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]), indexing="ij")
        if not rows.size:
            return 0
        return int(np.isin(self._first(camera, rows.ravel(), columns.ravel()), self._things).sum())

    def _focal(self, camera: str) -> float:
        """Focal length, pixels."""
        return self.image_size / 2 / math.tan(math.radians(self.model.cam_fovy[self._camera_ids[camera]]) / 2)

    def _first(self, camera: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The geom that each pixel [n] of a view shows, -1 for none."""
        model, data, i, half, count = self.model, self.data, self._camera_ids[camera], self.image_size / 2, len(rows)
        model.geom_group[:] = self._groups  # `render` has hidden what the last picture did not show
        rays = np.stack((columns + 0.5 - half, half - rows - 0.5, np.full(count, -self._focal(camera))), 1)
        rays = rays @ data.cam_xmat[i].reshape(3, 3).T
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        first, far = np.empty(count, np.int32), np.empty(count)
        mujoco.mj_multiRay(model, data, data.cam_xpos[i], rays.ravel(), _DRAWN, 1, -1, first, far, None, count, 10.0)
        return first

    def _in_view(self, camera: str) -> np.ndarray:
        """Tell which geoms [geom] reach into a camera's view; drawing the others takes time and changes no pixel."""
        model, data, i = self.model, self.data, self._camera_ids[camera]
        x, y, z = ((data.geom_xpos - data.cam_xpos[i]) @ data.cam_xmat[i].reshape(3, 3)).T  # right, up, backwards
        half = math.radians(model.cam_fovy[i]) / 2  # of the angle of view, which is as wide as high
        outside = np.maximum(abs(x), abs(y)) * math.cos(half) + z * math.sin(half)  # m, of the nearest side
        return outside < self._reach

    def _make_renderer(self) -> Renderer:
        try:
            return Renderer(self.model, self.image_size)
        except Exception as error:
            raise RuntimeError(f"{REMEDY} ({error!r})") from error

    def close(self) -> None:
        """Free the GL context."""
        if self._renderer is not None:
            self._free()
            self._renderer = None
