"""Domain randomisation: camera, light, colours, textures, mass, friction and distractors of an episode.

A `Variation` holds whole model fields, so that applying one leaves nothing of another behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mujoco
import numpy as np

from envs.control import WORKSPACE
from envs.scene import Scene, yaw_quat
from envs.tasks import Episode, leaves_room

DISTRACTORS = 3
DISTRACTOR_HEIGHTS = (0.02, 0.025, 0.02)  # m, halves, as in scene.xml
MOVES_AT = 4  # steps after which posts move
CLEAR = 0.095  # m, from a distractor's middle to wherever the object is to be


@dataclass(frozen=True)
class Level:
    """How much of what a level of randomisation changes."""

    camera_shift: float = 0.0  # m, at most, per axis
    camera_turn: float = 0.0  # rad, at most
    light: float = 0.0  # relative, at most
    distractors: int = 0  # at most
    least_distractors: int = 0
    colours: float = 0.0  # how far a colour goes towards a random one, 0 to 1
    mass: tuple[float, float] = (1.0, 1.0)  # factor, from, to
    friction: tuple[float, float] = (1.0, 1.0)  # factor of the object's and the table's, from, to
    grip: tuple[float, float] = (1.0, 1.0)  # factor of the fingers', which rules what they hold; below 0.02 they hold little
    textures: bool = False
    occluder: bool = False  # a thing in the air before the front camera
    post_moves: float = 0.0  # m, each post, after the first steps of an episode


SHIFTS: dict[str, Level] = {  # one thing each
    "camera": Level(camera_shift=0.05, camera_turn=np.deg2rad(5.0)),
    "light": Level(light=0.8),
    "colours": Level(colours=0.6, textures=True),
    "distractors": Level(distractors=3, least_distractors=3),
    "occluder": Level(occluder=True),
    "heavy": Level(mass=(4.0, 6.0)),
    "slippery": Level(friction=(0.3, 0.4), grip=(0.012, 0.06)),
    "moved-post": Level(post_moves=0.04),
}
LEVELS: dict[str, Level | None] = {
    "none": None,
    "mild": Level(camera_shift=0.02, camera_turn=np.deg2rad(2.0), light=0.2, distractors=2),
    "hidden": Level(  # mild, and what no picture tells
        camera_shift=0.02, camera_turn=np.deg2rad(2.0), light=0.2, distractors=2, mass=(1 / 2.0, 2.0), grip=(0.01, 1.0),
    ),  # fmt: skip
    "slips": Level(mass=(1 / 2.0, 2.0), grip=(0.01, 0.3)),  # much of what is lifted stays behind, and nothing tells beforehand
    "strong": Level(
        camera_shift=0.03, camera_turn=np.deg2rad(2.5), light=0.4, distractors=3, colours=0.6, mass=(1 / 2.0, 2.0),
        friction=(1 / 1.5, 1.5), textures=True,
    ),  # fmt: skip
    **SHIFTS,
}


@dataclass(frozen=True)
class Variation:
    """What differs from the scene's XML in an episode: model fields by name; distractors' poses [3, 7], m and wxyz."""

    fields: dict[str, np.ndarray]
    distractors: np.ndarray | None  # None: parked
    moves: np.ndarray | None = None  # [n, 2] m, of the episode's posts, after MOVES_AT steps


class Randomizer:
    """Draws and applies variations of one scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._nominal: dict[str, np.ndarray] = {}  # of the fields that have ever been changed
        self._table = scene.model.geom("table").id
        self._materials = [i for i in range(scene.model.nmat) if scene.model.mat(i).name.startswith("table")]
        self._object = scene.model.body("object").id
        self._fingers = [scene.model.geom(f"finger_{side}").id for side in ("left", "right")]
        self._mocaps = [int(scene.model.body(f"distractor{i}").mocapid[0]) for i in range(DISTRACTORS)]
        self._things = [i for i in range(scene.model.ngeom) if scene.model.geom(i).name.startswith("object")]

    def draw(self, level: str, places: np.ndarray, rng: np.random.Generator) -> Variation:
        """Draw a variation of a level; distractors keep away from `places` [n, 2 or 3], where the object is to be or a post is."""
        amount = LEVELS[level]
        if amount is None:
            return Variation({}, None)
        fields: dict[str, np.ndarray] = {}
        self._draw_camera(amount, fields, rng)
        self._draw_light(amount, fields, rng)
        self._draw_colours(amount, fields, rng)
        self._draw_physics(amount, fields, rng)
        distractors = self._draw_distractors(amount, places, rng)
        if amount.occluder:
            distractors[0, :3] = self._before_the_camera(rng)
        self._draw_grip(amount, fields, rng)
        return Variation(fields, distractors)

    def redraw_physics(self, variation: Variation, level: str, rng: np.random.Generator) -> Variation:
        """Draw mass, friction and grip of a variation anew, which looks the same."""
        fields, amount = dict(variation.fields), LEVELS[level] or Level()
        self._draw_physics(amount, fields, rng)
        self._draw_grip(amount, fields, rng)
        return replace(variation, fields=fields)

    def draw_moves(self, level: str, episode: Episode, rng: np.random.Generator) -> np.ndarray | None:
        """Draw where the posts of an episode go, each in a direction that leaves room for the hand; None where they stay."""
        far = LEVELS[level].post_moves if LEVELS[level] else 0.0
        if not far or not len(episode.posts):
            return None
        moves = np.zeros_like(episode.posts)
        for move, post in zip(moves, episode.posts):
            angles = rng.uniform(-np.pi, np.pi, 20)
            ways = far * np.column_stack((np.cos(angles), np.sin(angles)))
            free = [way for way in ways if leaves_room(post + way, episode)]
            move[:] = free[0] if free else 0.0
        return moves

    def apply(self, variation: Variation) -> None:
        """Make the scene as the variation has it; whatever it does not name is as in the XML."""
        model = self._scene.model
        for name in variation.fields:
            self._nominal.setdefault(name, getattr(model, name).copy())
        for name, nominal in self._nominal.items():
            getattr(model, name)[:] = variation.fields.get(name, nominal)
        if variation.distractors is not None:
            self._scene.data.mocap_pos[self._mocaps] = variation.distractors[:, :3]
            self._scene.data.mocap_quat[self._mocaps] = variation.distractors[:, 3:]

    def _field(self, name: str) -> np.ndarray:
        """Copy a field as it is in the XML."""
        return self._nominal.get(name, getattr(self._scene.model, name)).copy()

    def _draw_camera(self, amount: Level, fields: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        pos, quat = self._field("cam_pos"), self._field("cam_quat")
        for i in range(len(pos)):
            axis = rng.normal(size=3)
            turn = np.empty(4)
            mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), rng.uniform(0, amount.camera_turn))
            shift = rng.uniform(-amount.camera_shift, amount.camera_shift, 3)
            if self._scene.model.cam_bodyid[i] != 0:  # on the hand: a mounting is off by less
                shift = shift / 4
            pos[i] += shift
            mujoco.mju_mulQuat(quat[i], quat[i].copy(), turn)
        fields.update(cam_pos=pos, cam_quat=quat)

    def _draw_light(self, amount: Level, fields: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        direction, diffuse = self._field("light_dir"), self._field("light_diffuse")
        direction += rng.uniform(-amount.light, amount.light, direction.shape) * [1, 1, 0]
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        tint = rng.uniform(-0.1, 0.1, diffuse.shape) * amount.light
        diffuse *= 1 + rng.uniform(-amount.light, amount.light) + tint
        fields.update(light_dir=direction, light_diffuse=diffuse.clip(0, 1))

    def _draw_colours(self, amount: Level, fields: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        colours, materials = self._field("geom_rgba"), self._field("mat_rgba")
        for i in range(DISTRACTORS):
            colours[self._scene.model.geom(f"distractor{i}").id, :3] = rng.uniform(0.05, 0.95, 3)
        # Whatever has one colour keeps one: the arm's links, the fingers, the sides of a cup. Any but the default would hide a material.
        plain = self._field("geom_matid") < 0
        for colour in np.unique(colours[:, :3], axis=0):
            same = (colours[:, :3] == colour).all(1)
            colours[same & plain, :3] += amount.colours * (rng.uniform(0.05, 0.95, 3) - colour)
        materials[:, :3] += amount.colours * (rng.uniform(0.1, 0.9, 3) - materials[:, :3])
        fields.update(geom_rgba=colours, mat_rgba=materials)
        if amount.textures:
            matid = self._field("geom_matid")
            matid[self._table] = rng.choice(self._materials)
            fields["geom_matid"] = matid

    def _draw_physics(self, amount: Level, fields: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        mass, friction = _factor(amount.mass, rng), _factor(amount.friction, rng)
        at, dof = self._object, slice(self._scene.model.body("object").dofadr[0], None)
        for name, index, factor in (
            ("body_mass", at, mass),
            ("body_inertia", at, mass),
            ("body_subtreemass", at, mass),
            ("body_invweight0", at, 1 / mass),
            ("dof_invweight0", dof, 1 / mass),
            ("dof_M0", dof, mass),  # where MuJoCo takes the inertia of a simple body from (`body_simple`)
            ("geom_friction", [*self._things, self._table], friction),  # the greater of the two counts
        ):
            value = self._field(name)
            value[index] *= factor
            fields[name] = value

    def _draw_grip(self, amount: Level, fields: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        fields["geom_friction"][self._fingers] *= _factor(amount.grip, rng)

    def _before_the_camera(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a place [3] in the air, three tenths of the way from the front camera to a place on the table."""
        camera = self._scene.model.camera("front").pos
        seen = np.append(rng.uniform(WORKSPACE[0, :2], WORKSPACE[1, :2]), 0.03)
        return camera + 0.3 * (seen - camera)

    def _draw_distractors(self, amount: Level, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        poses = np.zeros((DISTRACTORS, 7))
        poses[:, :3] = [0, 0, -2]  # parked under the floor
        poses[:, 3] = 1
        taken = [*places[:, :2]]
        for i in rng.permutation(DISTRACTORS)[: rng.integers(amount.least_distractors, amount.distractors + 1)]:
            for _ in range(20):  # a crowded table gets fewer
                spot = rng.uniform(WORKSPACE[0, :2] - [0.04, 0.05], WORKSPACE[1, :2] + [0.04, 0.05])
                if min(np.linalg.norm(spot - other) for other in taken) >= CLEAR:
                    taken.append(spot)
                    poses[i] = [*spot, DISTRACTOR_HEIGHTS[i], *yaw_quat(rng.uniform(-np.pi, np.pi))]
                    break
        return poses


def _factor(between: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw a factor, even in its logarithm."""
    low, high = between
    return low * (high / low) ** rng.uniform()
