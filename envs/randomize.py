"""Domain randomisation: camera, light, colours, textures, mass, friction and distractors of an episode.

A `Variation` holds whole model fields, so that applying one leaves nothing of another behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from envs.control import WORKSPACE
from envs.scene import Scene, yaw_quat

LEVELS = ("none", "mild", "strong")
_FIELDS = ("cam_pos", "cam_quat", "light_pos", "light_dir", "light_diffuse", "geom_rgba", "mat_rgba", "geom_friction",
           "body_mass", "body_inertia", "tex_data")  # fmt: skip


@dataclass(frozen=True)
class Variation:
    """What differs from the scene's XML in an episode: model fields by name (empty: nothing), and the distractors' poses."""

    fields: dict[str, np.ndarray]
    distractors: np.ndarray | None  # [3, 7] m and wxyz; None: parked


class Randomizer:
    """Draws and applies variations of one scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._nominal = {name: getattr(scene.model, name).copy() for name in _FIELDS}
        self._changed: set[str] = set()

    def draw(self, level: str, places: np.ndarray, rng: np.random.Generator) -> Variation:
        """Draw a variation of a level; distractors keep away from `places` [n, 3], where the object will be."""
        if level == "none":
            return Variation({}, None)
        raise NotImplementedError

    def apply(self, variation: Variation) -> None:
        """Make the scene's model as the variation has it; whatever it does not name is as in the XML."""
        for name in self._changed - set(variation.fields):
            getattr(self._scene.model, name)[:] = self._nominal[name]
        for name, value in variation.fields.items():
            getattr(self._scene.model, name)[:] = value
        self._changed = set(variation.fields)
