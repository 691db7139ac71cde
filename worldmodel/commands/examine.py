"""Examine a world model from the bottom up: what it imagines, whether grasps are real, and where its energy is low.

On episodes of box and cup, held out as long as their seeds are not those of its data: the open-loop error per horizon
beside that of copying the last frame, in patches that show the robot and that show the object; whether an object rises
with a closed hand just where it did; what z carries in steps that branch, for mass and grip are hidden, and in others; and
the energy around goal pictures, along lines through them, of a step's actions, and of gripper commands. --out gets
examine.json and pictures of all of it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from worldmodel.commands.probe import episodes_for


@dataclass(frozen=True)
class Config:
    """What to examine, and with how much."""

    model: Path | None = None
    """model.safetensors (default: the shipped weights)"""
    out: Path | None = None
    """folder for examine.json, dynamics.png and energy.png (default: none)"""
    episodes: int = 400
    """episodes to imagine, box and cup by turns"""
    seed: int = 10_000
    """seed of the first of them, and of the goals"""
    goals: int = 40
    """goals of each kind, around which the energy is measured"""
    forks: int = 60
    """episodes whose steps are repeated with other hidden mass and grip that fit what was seen so far; 0: none, and nothing of z"""
    frames: int = 8_000
    """frames of other episodes to train the probe on that reads the object's height"""
    probe_seed: int = 5000
    """seed of the first of those"""
    cameras: tuple[str, ...] = ("front",)
    """views, as the model was trained with"""
    workers: int = 2
    """processes that collect; changes no result"""
    threads: int = 2
    """processor threads"""

    def __post_init__(self):
        for name in ("episodes", "goals", "workers", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.forks < 0:
            raise ValueError(f"forks is {self.forks}, expected at least 0")
        if self.frames < 50:
            raise ValueError(f"frames is {self.frames}, expected at least 50")
        if min(self.seed, self.probe_seed) < 0:
            raise ValueError(f"seed and probe-seed are {self.seed} and {self.probe_seed}, expected at least 0")
        many = episodes_for(self.frames)
        if self.probe_seed - max(self.episodes, self.goals, self.forks) < self.seed < self.probe_seed + many:
            raise ValueError(f"seed {self.seed}: the episodes from there on meet the probe's {many} from {self.probe_seed} on")


def run(config: Config) -> dict:
    """Measure, and draw where --out says so."""
    import torch
    from tqdm import tqdm

    from worldmodel import model
    from worldmodel.commands import branching, dynamics, landscape
    from worldmodel.files import replacing
    from worldmodel.model import shipped

    torch.set_num_threads(config.threads)
    path = config.model or shipped()
    world = model.load(path)
    if world.encoder.config.views != len(config.cameras):
        raise ValueError(f"{path} looks through {world.encoder.config.views} cameras, got {', '.join(config.cameras)}")
    dynamics.record(world, config.cameras, config.seed)  # notices what is wrong before anything takes long
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    height = _height_probe(config, world)
    seeds = range(config.seed, config.seed + config.episodes)
    episodes = [dynamics.record(world, config.cameras, seed) for seed in tqdm(seeds, desc="episodes", delay=2)]
    forks = config.forks if hasattr(world.predictor, "posterior_of") else 0  # nobody's but ours has a posterior
    seeds = range(config.seed, config.seed + forks)
    steps = [step for seed in tqdm(seeds, desc="forks", delay=2) for step in branching.steps_of(world, config.cameras, seed)]
    seeds = range(config.seed, config.seed + config.goals)
    landscapes = [landscape.around(world, config.cameras, seed) for seed in tqdm(seeds, desc="goals", delay=2)]
    result = {
        "model": str(path),
        "seed": config.seed,
        "episodes": config.episodes,
        "open_loop": dynamics.open_loop(world, episodes),
        "grasps": dynamics.grasps(world, episodes, height),
        "latent": branching.judge(world, steps),
        "energy": landscape.minima(landscapes),
    }
    if config.out is not None:
        with replacing(config.out / "examine.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        for name, figure in (("dynamics", _dynamics(result["open_loop"])), ("energy", _energy(landscapes))):
            with replacing(config.out / f"{name}.png") as file:
                figure.savefig(file, format="png")
        result["out"] = str(config.out)
    return result


def _height_probe(config: Config, world):
    """A function from patches [P, D] to the object's height, m, by an attentive probe on other episodes' frames."""
    import torch

    from worldmodel import probe
    from worldmodel.commands.probe import Config as ProbeConfig
    from worldmodel.commands.probe import frames_of

    with tempfile.TemporaryDirectory() as folder:
        size, beyond = world.encoder.config.image_size, config.probe_seed + config.frames  # no test frames are asked for
        recipe = ProbeConfig(frames=config.frames, seed=config.probe_seed, test_seed=beyond, workers=config.workers, cameras=config.cameras)
        pixels, labels = frames_of(recipe, Path(folder, "probe"), config.probe_seed, config.frames, size)
    targets = torch.from_numpy(labels.object).float()
    reader = probe.fit(probe.features_of(world.encoder, pixels), targets, torch.ones_like(targets), recipe.epochs)
    return lambda patches: float(reader(patches[None].float())[0, 2])


def report(result: dict) -> str:
    """The same as tables."""
    lines = [f"{result['model']}, {result['episodes']} episodes from seed {result['seed']} on", ""]
    loop, energy = result["open_loop"], result["energy"]
    lines.append("L1 of features, imagined / copying the last frame, in patches that show")
    lines.append("steps  " + "  ".join(f"{name:>15}" for name in loop))
    for h in range(len(loop["anything"]["imagined"])):
        cells = [f"{row['imagined'][h]:.3f} / {row['copied'][h]:.3f}" for row in loop.values()]
        lines.append(f"{h + 1:5}  " + "  ".join(f"{cell:>15}" for cell in cells))
    lines += ["", "after closing and lifting, the imagined object rises with the hand, or not, as it did"]
    for name, row in result["grasps"].items():
        low, high = row["ci95"]
        lines.append(f"{name:8}{row['right']} of {row['sequences']}, {row['share']:.1%}  [{low:.1%}, {high:.1%}]; "
                     f"the probe on true pictures {row['share_seen']:.1%}")  # fmt: skip
    if not result["grasps"]:
        lines.append("no such sequence: take more --episodes")
    keys = "draws", "mean", "best", "posterior", "shuffled", "spread"
    if result["latent"]:
        lines += ["", "z: L1 of features of what the draws alone leave open, with z at the prior's mean, the best of the prior's samples, the posterior's",
                  "mean, another step's, where steps that branch look different by how they end, and in all patches of steady ones; spread over all"]  # fmt: skip
        lines.append(f"{'':10}steps patches   nats" + "".join(f"{key:>11}" for key in keys))
    for name, row in result["latent"].items():
        cells = "".join(f"{row[key]:11.4f}" for key in keys)
        lines.append(f"{name:10}{row['steps']:5}{row['patches']:8.1f}{row['nats']:7.2f}{cells}")
    lines += ["", "energy of states on a line: minimum off the goal (mm, median, 95th percentile); rays that only rise"]
    for name, row in energy["states"].items():
        rising = "-" if row["rising"] is None else f"{row['rising']:.0%}"
        lines.append(f"{name:34}{row['median_mm']:6.1f}{row['p95_mm']:7.1f}   {rising} of {row['rays']}")
    lines += ["", "energy imagined of a step's actions: the best one off the straight one (mm, median, 95th percentile)"]
    lines += [f"{name:34}{row['median_mm']:6.1f}{row['p95_mm']:7.1f}" for name, row in energy["actions"].items()]
    lines += ["", "the gripper is right"]
    lines += [f"{name:38}{share:.0%}" for name, share in energy["gripper"].items()]
    return "\n".join(lines)


def _dynamics(open_loop: dict):
    """Curves of the open-loop error."""
    figure, panels = _figure(1, len(open_loop), (3.6 * len(open_loop), 3.4))
    for axes, (name, row) in zip(panels[0], open_loop.items()):
        for line, values in row.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", label=line)
        axes.set(title=f"patches that show {name}", xlabel="steps ahead (0.2 s)", ylim=(0, None))
    panels[0, 0].set_ylabel("L1 of features")
    panels[0, 0].legend()
    return figure


def _energy(landscapes: list):
    """Energies along lines, one curve a goal; in planes, of the first goal; over the gripper's commands."""
    from worldmodel.commands.landscape import GRIPPER, KINDS, LINES, PLANES

    figure, panels = _figure(len(KINDS), 8, (24, 6.5))
    one = landscapes[0]
    name = list(dict.fromkeys(key[1] for key in one.rays))[-1]
    for row, kind in enumerate(KINDS):
        for axes, line in zip(panels[row], LINES):
            for each in landscapes:
                axes.plot(100 * each.offsets, each.rays[kind, name, line], color="tab:blue", alpha=0.4, lw=0.8)
            axes.set(title=f"{kind}, {line}", xlabel="cm from the goal", ylim=(0, None))
        for axes, plane in zip(panels[row, 4:], PLANES):
            moves, energies = 100 * one.moves, one.planes[kind, name, plane]
            axes.contourf(moves, moves, energies.T, 20)
            axes.plot(*(100 * one.wanted[kind, name, plane]), "wx", ms=10, mew=2)
            axes.set(title=f"{kind}, imagined", xlabel=f"d{plane[0]} (cm)", ylabel=f"d{plane[1]} (cm)", aspect="equal")
    for axes, right in zip(panels[:, 6:].flat, GRIPPER):
        for each in landscapes:
            energies = each.gripper[right, name]
            axes.plot(each.commands, energies / energies[len(energies) // 2], color="tab:blue", alpha=0.4, lw=0.8)
        axes.set(title=right, xlabel="gripper action (-1 closes)", ylabel="energy / that of holding")
    panels[0, 0].set_ylabel(f"energy, {name}")
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float]):
    """A figure with a grid of axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure, panels
