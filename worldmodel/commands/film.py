"""Episodes as pictures that move: the current frame, the sub-goal it is after, the goal, and the energy so far, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldmodel import files

CAPTION = 18  # pixels
PANEL = 192  # pixels, height of a panel
COLOURS = "royalblue", "darkorange", "seagreen"  # of the energy to one sub-goal after the other


@dataclass(frozen=True)
class Film:
    """What an episode of T actions looked like."""

    frames: np.ndarray  # uint8 [T + 1, h, w, 3]
    goals: list[np.ndarray]  # each uint8 [h, w, 3]
    pursued: list[int]  # T indices into goals
    energies: list[float | None]  # T, of each observation to its goal; None where nobody measured it
    title: str
    ending: str


def write_film(path: Path, film: Film, fps: float = 5.0) -> None:
    """Write an animated WebP, or nothing at all."""
    from PIL import Image

    first, *others = [Image.fromarray(draw(film, t)) for t in range(len(film.frames))]
    moving = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
    with files.replacing(path) as file:
        first.save(file, "WEBP", quality=80, **moving)


def draw(film: Film, t: int) -> np.ndarray:
    """Frame t of a film: uint8 [PANEL + CAPTION, w, 3]."""
    from PIL import Image, ImageDraw

    last = t == len(film.frames) - 1
    index = film.pursued[min(t, len(film.pursued) - 1)]
    panels = [(_enlarged(film.frames[t]), f"{film.title}, step {t}" + (f": {film.ending}" if last else ""))]
    if len(film.goals) > 1:
        panels.append((_enlarged(film.goals[index]), f"sub-goal {index + 1} of {len(film.goals)}"))
    panels.append((_enlarged(film.goals[-1]), "goal"))
    if any(energy is not None for energy in film.energies):
        panels.append((_curve(film, t), "energy"))
    image = Image.new("RGB", (sum(panel.shape[1] for panel, _ in panels), PANEL + CAPTION), "white")
    pen, left = ImageDraw.Draw(image), 0
    for panel, text in panels:
        image.paste(Image.fromarray(panel), (left, CAPTION))
        pen.text((left + 4, 3), text, "black", font_size=11)
        left += panel.shape[1]
    return np.asarray(image)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    import cv2

    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (round(width * PANEL / height), PANEL), interpolation=cv2.INTER_NEAREST)


def _curve(film: Film, t: int) -> np.ndarray:
    """The energy up to step t, a colour for each sub-goal: uint8 [PANEL, w, 3]."""
    from PIL import Image, ImageDraw

    width, edge = 256, 14
    known = [energy for energy in film.energies if energy is not None]
    top = max(max(known), 1e-9)
    image = Image.new("RGB", (width, PANEL), "white")
    pen = ImageDraw.Draw(image)

    def at(step: int, energy: float) -> tuple[float, float]:
        across = edge + (width - 2 * edge) * step / max(1, len(film.energies) - 1)
        return across, PANEL - edge - (PANEL - 2 * edge) * energy / top

    pen.line([at(0, top), at(0, 0), at(len(film.energies) - 1, 0)], "gray")
    pen.text((edge + 3, 1), f"{top:.3f}", "gray", font_size=10)
    points = [(step, energy) for step, energy in enumerate(film.energies[: t + 1]) if energy is not None]
    for (a, before), (b, after) in zip(points, points[1:]):
        colour = COLOURS[film.pursued[b] % len(COLOURS)]
        pen.line([at(a, before), at(b, after)], colour, width=2)
    if points:
        x, y = at(*points[-1])
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill="black")
        pen.text((min(x + 5, width - 40), max(y - 14, 0)), f"{points[-1][1]:.3f}", "black", font_size=10)
    return np.asarray(image)

