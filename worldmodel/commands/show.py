"""Make pictures of datasets, episodes, trainings and benchmarks.

An episode becomes a contact sheet (.png) or moves (.webp), the next action below each frame, in red after an unsafe
step; so does a dataset, with some of its episodes one below the other. A training becomes the curves of its
metrics.jsonl; a folder of benchmarks the success rates of every results.json in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from worldmodel import data, files

FORMATS = (".png", ".webp")


@dataclass(frozen=True)
class Config:
    """What to show, and where to write the picture."""

    path: Positional[Path]
    """an episode (.npz), or the folder of a dataset, of a training, or of one or more benchmarks"""
    out: Path
    """picture to write, .png or (episodes and datasets) animated .webp; one that is there is replaced"""
    episodes: int = 8
    """at most so many episodes of a dataset, spread evenly over it"""
    frames: int = 48
    """at most so many frames of an episode in a contact sheet; of a dataset it shows 8 of each"""
    scale: int = 2
    """enlargement: width and height of a camera's pixel in the picture (pixels)"""
    fps: float = 5.0
    """speed of a .webp (frames per second); 5 is the robot's own"""

    def __post_init__(self):
        for name in ("episodes", "frames", "scale", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.out.suffix not in FORMATS:
            raise ValueError(f"cannot write {self.out}: expected a name that ends in {' or '.join(FORMATS)}")


def run(config: Config) -> dict:
    """Write the picture, and return what it shows."""
    kind, draw = _kind(config.path)
    if config.out.suffix == ".webp" and kind not in ("episode", "dataset"):
        raise ValueError(f"{config.path} holds {kind}, which does not move; expected --out to end in .png")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    images = draw(config)  # each [h, w, 3]
    from PIL import Image

    first, *others = map(Image.fromarray, images)
    with files.replacing(config.out) as file:
        if config.out.suffix == ".webp":
            moving = {"save_all": True, "append_images": others, "duration": round(1000 / config.fps), "loop": 0}
            first.save(file, "WEBP", quality=80, **moving)
        else:
            first.save(file, "PNG")
    return {"out": str(config.out), "kind": kind, "images": len(images), "size": list(first.size)}


def report(result: dict) -> str:
    """The same for people."""
    width, height = result["size"]
    return f"{result['out']}: {result['kind']}, {width} x {height}, {result['images']} images"


def _kind(path: Path):
    """What lies at a path, and the function that draws it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; expected an episode or the folder of a dataset, training or benchmark")
    if path.suffix == ".npz":
        return "episode", _draw_episode
    if (path / "dataset.json").exists():
        return "dataset", _draw_dataset
    if (path / "metrics.jsonl").exists():
        return "curves", _draw_curves
    if path.is_dir() and any(path.rglob("results.json")):
        return "success rates", _draw_rates
    raise ValueError(f"nothing to show in {path}; expected an episode (.npz), or a folder with dataset.json, metrics.jsonl "
                     "or results.json")  # fmt: skip


# Episodes


def _episode(path: Path) -> dict[str, np.ndarray]:
    return data.read_episode(path, ("pixels", "actions", *({"privileged/unsafe"} & data.keys_of(path))))


def _draw_episode(config: Config) -> list[np.ndarray]:
    episode = _episode(config.path)
    if config.out.suffix == ".webp":
        return [_captioned(episode, t, config.scale) for t in range(len(episode["pixels"]))]
    return [_grid([_captioned(episode, t, config.scale) for t in _spread(len(episode["pixels"]), config.frames)], 8)]


def _draw_dataset(config: Config) -> list[np.ndarray]:
    there = data.Dataset.open(config.path).episodes
    episodes = [_episode(there[i].path) for i in _spread(len(there), config.episodes)]
    if len(sizes := {e["pixels"].shape[1:] for e in episodes}) > 1:
        raise ValueError(f"{config.path} has pictures of several sizes, {', '.join(map(str, sorted(sizes)))}: expected one size in a dataset")
    if config.out.suffix == ".png":
        shown = [(e, t) for e in episodes for t in np.linspace(0, len(e["pixels"]) - 1, 8).astype(int)]
        return [_grid([_captioned(e, t, config.scale) for e, t in shown], 8)]
    columns = math.ceil(math.sqrt(len(episodes)))
    return [
        _grid([_captioned(e, min(t, len(e["pixels"]) - 1), config.scale) for e in episodes], columns)
        for t in range(max(len(e["pixels"]) for e in episodes))
    ]


def _spread(count: int, limit: int) -> Sequence[int]:
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)


def _captioned(episode: dict[str, np.ndarray], t: int, scale: int) -> np.ndarray:
    """Frame t over its step and the action that follows, the unsafe ones in red: [h, w, 3]."""
    from PIL import Image, ImageDraw

    frame = episode["pixels"][t].repeat(scale, 0).repeat(scale, 1)
    image = Image.new("RGB", (frame.shape[1], frame.shape[0] + 14), "white")
    image.paste(Image.fromarray(frame))
    unsafe = "privileged/unsafe" in episode and episode["privileged/unsafe"][t]
    action = episode["actions"][t] if t < len(episode["actions"]) else ()
    text = f"{t:2}  " + " ".join(f"{a:+.1f}" for a in action)
    ImageDraw.Draw(image).text((2, frame.shape[0] + 1), text, "red" if unsafe else "black", font_size=11)
    return np.asarray(image)


def _grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size side by side, row after row: [h, w, 3]."""
    images = [np.pad(image, ((0, 0), (0, 2), (0, 0)), constant_values=255) for image in images]
    columns = min(columns, len(images))
    height, width = images[0].shape[:2]
    sheet = np.full((math.ceil(len(images) / columns) * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return sheet


# Trainings and benchmarks


def _draw_curves(config: Config) -> list[np.ndarray]:
    lines = (config.path / "metrics.jsonl").read_text().splitlines()
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{config.path / 'metrics.jsonl'} is damaged ({error})") from None
    numbers = [{key: value for key, value in row.items() if isinstance(value, (int, float))} for row in rows]
    keys = [key for key in dict.fromkeys(key for row in numbers for key in row) if key not in ("step", "minutes")]
    if not keys:
        raise ValueError(f"{config.path / 'metrics.jsonl'} has no numbers yet; let the training run on")
    from matplotlib.figure import Figure

    columns = min(3, len(keys))
    figure = Figure((4.2 * columns, 2.6 * math.ceil(len(keys) / columns)), layout="constrained")
    for axes, key in zip(figure.subplots(math.ceil(len(keys) / columns), columns, squeeze=False).flat, keys):
        points = [(row.get("step", i), row[key]) for i, row in enumerate(numbers) if key in row]
        axes.plot(*zip(*points), lw=1, marker="." if len(points) < 30 else None)
        values = [y for _, y in points if math.isfinite(y)]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set_title(key, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(keys) :]:
        axes.remove()
    return [_rendered(figure)]


def _draw_rates(config: Config) -> list[np.ndarray]:
    from matplotlib.figure import Figure

    found = {path.parent.relative_to(config.path).as_posix(): _episodes_told(path) for path in sorted(config.path.rglob("results.json"))}
    found = {name: result for name, result in found.items() if result}
    if not found:
        raise ValueError(f"no results.json under {config.path} tells of episodes; make one with `worldmodel bench`")
    results = list(found.values())
    told = ({**r["config"], **r["summary"]} for r in results)  # a summary knows an environment of others by its name
    played = [", ".join(filter(None, (about.get(key) for key in ("task", "object", "policy")))) for about in told]
    names = [what if name == "." else f"{name}\n{what}" for name, what in zip(found, played)]
    longest = max(len(line) for name in names for line in name.splitlines() or [""])
    figure = Figure((8 + 0.07 * longest, 1.2 + 0.5 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        summary, low_high = result["summary"], result["summary"]["success_ci95"]
        rate = summary["success_rate"]
        axes.barh(row, rate, color="tab:blue", alpha=0.7)
        axes.errorbar(rate, row, xerr=[[max(0.0, rate - low_high[0])], [max(0.0, low_high[1] - rate)]], color="black", capsize=3)
        text = f"{rate:.0%}  [{low_high[0]:.0%}, {low_high[1]:.0%}] of {len(result['episodes'])}, unsafe {summary['unsafe_rate']:.0%}"
        axes.text(1.02, row, text, va="center", fontsize=9)
    axes.set_yticks(range(len(results)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("success rate, with its 95 % interval (Wilson)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return [_rendered(figure)]


def _episodes_told(path: Path) -> dict | None:
    """What a results.json says, if it is of a benchmark's episodes: a recording's steps succeed at nothing, and others have such files too."""
    try:
        result = json.loads(path.read_bytes())
        return result if "success_rate" in result["summary"] and "config" in result and "episodes" in result else None
    except (ValueError, TypeError, KeyError):
        return None


def _rendered(figure) -> np.ndarray:
    """A figure as an image [h, w, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
