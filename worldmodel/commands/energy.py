"""Draw the energy around a recorded robot action: what a world model thinks of it, offline.

From a recorded trajectory, the model imagines a step with each of a grid of translations from the picture before, and
compares what it imagines with the picture after (V-JEPA 2's own example). The energy should be lowest near the translation
that was recorded. With --samples, CEM plans the step as well. Distances are between the action and the recorded one.

The trajectory is an .npz with `observations`, uint8 [T, h, w, 3], and `states`, float [T, 7] (position of the gripper in
the robot's base frame in metres, extrinsic xyz Euler angles in radians, closedness 0 to 1), or with a first axis of 1.
V-JEPA 2-AC is given the recorded states; a model of this project reads what it calls proprioception off the picture.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

PLANES = ("xy", "xz", "yz")


@dataclass(frozen=True)
class Config:
    """What to look at, and how closely."""

    trajectory: Path
    """.npz with observations and states"""
    model: str | None = None
    """model.safetensors, vjepa2-ac-vitg.pt, or random:vjepa2-ac-vitg (None: the shipped model). Millimetres are of this project's robot,
    whose action of 1 is 5 cm, but for V-JEPA 2-AC, which says itself"""
    out: Path = Path("out/energy")
    """folder for energy.png; new or empty"""
    step: int = 0
    """which recorded step: from picture `step` to the next one"""
    grid: int = 5
    """translations along each axis; grid^3 in all"""
    radius: float = 0.075
    """of the grid, m, along each axis; less where an action of 1 is less"""
    samples: int = 0
    """also plan the step: CEM's candidates in an iteration (V-JEPA 2-AC's: 800; 0: do not plan)"""
    iterations: int = 2
    """CEM's iterations (V-JEPA 2-AC's: 10)"""
    chunk: int = 16
    """candidates imagined at once; bounds the memory"""
    seed: int = 0
    """of the planner's noise"""
    bfloat16: bool = False
    """hold the weights in half precision: of V-JEPA 2-AC's checkpoint, or of random ones"""
    threads: int = 2
    """processor threads"""

    def __post_init__(self):
        for name in ("grid", "chunk", "iterations", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.samples < 0 or self.step < 0 or self.radius <= 0:
            raise ValueError(f"expected samples and step of at least 0 and a positive radius, got {self.samples}, {self.step}, {self.radius}")


def recorded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [T, h, w, 3] and states float32 [T, 7] of a file. Raises FileNotFoundError, or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no trajectory at {path}")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # numpy's, zip's
        raise ValueError(f"{path} is not a whole .npz of arrays ({type(error).__name__})") from error
    if not {"observations", "states"} <= arrays.keys():
        raise ValueError(f"{path} holds {', '.join(arrays)}, expected observations and states")
    pixels, states = arrays["observations"], arrays["states"]
    if pixels.ndim == 5 and states.ndim == 3 and len(pixels) == len(states) == 1:
        pixels, states = pixels[0], states[0]
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or states.shape != (len(pixels), 7):
        raise ValueError(
            f"{path}: expected observations uint8 [T, h, w, 3] and states [T, 7], got {pixels.dtype} {list(pixels.shape)} "
            f"and {list(states.shape)}"
        )
    if not np.isfinite(states).all():
        raise ValueError(f"{path}: states hold NaN or infinity")
    return pixels, states.astype(np.float32)


def run(config: Config) -> dict:
    """Measure the energies, draw them, and say where they are lowest."""
    import torch

    from planners.sampling import VJEPA2_AC, SamplingPlanner
    from worldmodel import files, hub
    from worldmodel.model import shipped
    from worldmodel.vjepa2_ac import change

    torch.set_num_threads(config.threads)
    pixels, states = recorded(config.trajectory)
    if config.step + 1 >= len(pixels):
        raise ValueError(f"step is {config.step}, expected at most {len(pixels) - 2}: {config.trajectory} has {len(pixels)} pictures")
    world = hub.load_any(config.model or shipped(), torch.bfloat16 if config.bfloat16 else None)
    if not hasattr(world, "rollout"):
        raise ValueError(f"{config.model} is an encoder, expected a model")
    scale = metres(world)
    wanted = change(*torch.from_numpy(states[config.step : config.step + 2])).numpy()
    with files.fresh(config.out, "energy") as folder:
        start = time.perf_counter()
        cost = cost_of(world, pixels, states, config.step, config.chunk)
        encoded = time.perf_counter() - start
        along = [np.linspace(-1, 1, config.grid) * min(config.radius, unit) for unit in scale]  # m
        moves = np.stack(np.meshgrid(*along, indexing="ij"), -1)  # [G, G, G, 3]
        actions = torch.zeros(1, config.grid**3, 1, world.action_dim)
        actions[0, :, 0, :3] = torch.from_numpy(moves.reshape(-1, 3) / scale).float()
        start = time.perf_counter()
        energies = cost(actions)[0].float().numpy().reshape(moves.shape[:3])
        rollouts = time.perf_counter() - start
        lowest = moves[np.unravel_index(energies.argmin(), energies.shape)]
        result = {
            "model": config.model or "shipped", "trajectory": str(config.trajectory), "step": config.step,
            "recorded_mm": (1e3 * wanted[:3]).tolist(), "lowest_mm": (1e3 * lowest).tolist(),
            "error_mm": off(lowest, wanted), "no_motion_error_mm": off(np.zeros(3), wanted),
            "energy": {"lowest": float(energies.min()), "highest": float(energies.max())},
            "encode_seconds": encoded / 2, "candidate_seconds": rollouts / energies.size, "planned": None,
        }  # fmt: skip
        if config.samples:
            elites = min(VJEPA2_AC.elites, config.samples)
            budget = replace(VJEPA2_AC, samples=config.samples, iterations=config.iterations, elites=elites)
            start = time.perf_counter()
            planned = planned_move(world, cost, SamplingPlanner(budget), config.seed)
            seconds = time.perf_counter() - start
            full = seconds * VJEPA2_AC.samples * VJEPA2_AC.iterations / (config.samples * config.iterations)
            result["planned"] = {
                "mm": (1e3 * planned).tolist(), "error_mm": off(planned, wanted), "samples": config.samples,
                "iterations": config.iterations, "seconds": seconds, "full_budget_seconds": full,
            }  # fmt: skip
        result["figure"] = str(draw(folder, pixels[config.step : config.step + 2], along, energies, wanted[:3], lowest, result))
    return result


def cost_of(world, pixels: np.ndarray, states: np.ndarray, step: int, chunk: int):
    """The cost of actions [1, N, 1, A]: how far what is imagined of recorded step `step` is from the picture after it."""
    import torch

    from planners.imagine import imagine
    from worldmodel.energy import EnergyConfig, GoalEnergy
    from worldmodel.interface import Context, Features
    from worldmodel.vjepa2_ac import ACPredictor

    around = slice(step, step + 2)
    pair = seen(world, pixels[around], states[around] if isinstance(world.predictor, ACPredictor) else None)
    context = Context(Features(*(x[None, :1] for x in pair)), torch.zeros(1, 0, world.action_dim))
    energy = GoalEnergy(Features(pair.patches[1]), EnergyConfig(horizon="last", proprio_weight=0.0))
    return imagine(world, context, energy, 1, None, 0, chunk)


def offline(world, pixels: np.ndarray, states: np.ndarray, planner, seed: int, chunk: int = 16) -> list[dict]:
    """Plan every step of a recording from its picture to the next one: translations, and their distance from the recorded."""
    import torch

    from worldmodel.vjepa2_ac import change

    rows = []
    for step in tqdm(range(len(pixels) - 1), desc="recorded steps", unit="step", delay=2):
        wanted = change(*torch.from_numpy(states[step : step + 2])).numpy()
        start = time.perf_counter()
        cost = cost_of(world, pixels, states, step, chunk)
        move = planned_move(world, cost, planner, seed + step)
        rows.append({
            "step": step, "recorded_mm": (1e3 * wanted[:3]).round(1).tolist(), "planned_mm": (1e3 * move).round(1).tolist(),
            "error_mm": round(off(move, wanted), 1), "no_motion_error_mm": round(off(np.zeros(3), wanted), 1),
            "seconds": round(time.perf_counter() - start, 3),
        })  # fmt: skip
    return rows


def planned_move(world, cost, planner, seed: int) -> np.ndarray:
    """The translation [3] of one planned step, m."""
    import torch

    plan = planner.plan(cost, torch.zeros(1, 1, world.action_dim), torch.Generator().manual_seed(seed))
    return plan.actions[0, 0, :3].numpy() * metres(world)


def metres(world) -> np.ndarray:
    """What an action of 1 moves the hand by along x, y and z, m. Raises ValueError for a model of another robot."""
    from envs.base import ACTION_DIMS
    from envs.control import MOVE

    scale = getattr(world.predictor.config, "action_scale", None)
    if scale is None and world.action_dim not in ACTION_DIMS:
        raise ValueError(f"the model plans actions of {world.action_dim} numbers, and is of another robot than this project's: where its hand goes is not known")
    return np.array((scale or (MOVE,) * 3)[:3])


def seen(world, pixels: np.ndarray, states: np.ndarray | None):
    """Features of pictures [T, h, w, 3], enlarged or reduced to what the encoder takes."""
    import torch

    from worldmodel.encoder import fitted

    config = world.encoder.config
    wanted = config.image_size, config.views * config.image_size
    if not config.resize and pixels.shape[1:3] != wanted:
        if config.views > 1:
            raise ValueError(
                f"the pictures are {pixels.shape[2]} wide and {pixels.shape[1]} high: expected {wanted[1]} and {wanted[0]}, those of "
                f"{config.views} cameras side by side"
            )
        pixels = fitted(torch.from_numpy(pixels), replace(config, resize=config.image_size)).numpy()
    return world.encode({"pixels": pixels} if states is None else {"pixels": pixels, "proprio": states})


def off(move: np.ndarray, wanted: np.ndarray) -> float:
    """Distance of a translation from the recorded one, mm."""
    return 1e3 * float(np.linalg.norm(move - wanted[:3]))


def draw(folder: Path, pixels: np.ndarray, along: list, energies: np.ndarray, wanted: np.ndarray, lowest: np.ndarray, result: dict) -> Path:
    """The two pictures, and the energy over each plane, least over the third axis, with both translations marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(20, 4), layout="constrained")
    for axis, picture, title in zip(axes, pixels, ("before", "after")):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    for axis, plane in zip(axes[2:], PLANES):
        i, j = ("xyz".index(letter) for letter in plane)
        shown = energies.min(3 - i - j)
        image = axis.pcolormesh(1e3 * along[i], 1e3 * along[j], shown.T, shading="nearest")
        axis.plot(*(1e3 * wanted[[i, j]]), "r+", markersize=14, markeredgewidth=2, label="recorded")
        axis.plot(*(1e3 * lowest[[i, j]]), "wx", markersize=10, markeredgewidth=2, label="lowest energy")
        if result["planned"]:
            axis.plot(result["planned"]["mm"][i], result["planned"]["mm"][j], "w.", markersize=10, label="planned")
        axis.set(xlabel=f"{plane[0]} (mm)", ylabel=f"{plane[1]} (mm)", title=f"energy, least over {'xyz'[3 - i - j]}")
        figure.colorbar(image, ax=axis)
    axes[2].legend(loc="upper left", facecolor="grey")
    figure.suptitle(f"{Path(str(result['model'])).name}: lowest energy {result['error_mm']:.0f} mm from the recorded action")
    path = folder / "energy.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def report(result: dict) -> str:
    """The result in words."""
    spell = lambda mm: " ".join(f"{v:.0f}" for v in mm)  # noqa: E731
    lines = [
        f"recorded  {spell(result['recorded_mm'])} mm (x y z)",
        f"lowest    {spell(result['lowest_mm'])} mm, {result['error_mm']:.0f} mm from it (no motion: {result['no_motion_error_mm']:.0f})",
        f"energy    {result['energy']['lowest']:.4f} to {result['energy']['highest']:.4f}",
        f"seconds   {result['encode_seconds']:.2f} to encode a picture, {result['candidate_seconds']:.3f} for a candidate",
    ]
    if plan := result["planned"]:
        lines.append(
            f"planned   {spell(plan['mm'])} mm, {plan['error_mm']:.0f} mm from it, with {plan['samples']} x {plan['iterations']} in "
            f"{plan['seconds']:.1f} s; V-JEPA 2-AC's 800 x 10 would take {plan['full_budget_seconds']:.0f} s"
        )
    return "\n".join([*lines, f"figure    {result['figure']}"])
