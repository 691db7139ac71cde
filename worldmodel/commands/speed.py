"""Measure on the spot what this machine can do, what the planner makes of it, and where a decision's time goes.

The machine's peak is that of large dense matrix products. Decisions are those of real episodes, from pixels, with a gate
that judges each plan. Beside them stand, with random weights and in the same precision, a predictor of LeWM's size with
its planner's budget, measured whole, and V-JEPA 2-AC's predictor, of which one step of one candidate is measured and
multiplied. All ratios are within the one run. --out gets speed.json and a plot of how decisions grow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from worldmodel import files
from worldmodel.commands import bench
from worldmodel.commands.others import lewm, precision_used, timed, vjepa2_ac
from worldmodel.commands.throughput import MANY, collecting, counted, playing, several, training

GROWTH = {  # a decade each
    "candidates": (16, 32, 64, 160),
    "horizon": (1, 2, 4, 10),
    "samples of z": (1, 2, 4, 10),
    "tokens of a frame": (5, 17, 37, 65),
}


@dataclass(frozen=True)
class Config:
    """What to time, and how long."""

    model: Path | None = None
    """model.safetensors (default: the shipped weights)"""
    out: Path | None = None
    """folder for speed.json and growth.png (default: none)"""
    decisions: int = 100
    """decisions to time, of episodes of pick-place"""
    samples: int | None = None
    """candidate plans per iteration (default: that of `worldmodel bench`)"""
    iterations: int | None = None
    """refinements of a plan (default: that of `worldmodel bench`)"""
    horizon: int | None = None
    """length of a plan (steps) (default: that of `worldmodel bench`)"""
    cameras: tuple[str, ...] = ("front",)
    """views, as the model was trained with"""
    seed: int = 0
    """seed of the first episode"""
    peers: bool = True
    """also time predictors of others' sizes"""
    growth: bool = True
    """also time how a decision grows with candidates, horizon, samples of z and tokens"""
    training: bool = True
    """also time training steps of encoder and predictor, collecting and benchmarking with one and two workers, and deciding for eight
    environments"""
    threads: int = 2
    """processor threads"""

    def __post_init__(self):
        for name in ("decisions", "samples", "iterations", "horizon", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")


def run(config: Config) -> dict:
    """Time everything, and write it where --out says so."""
    with contextlib.nullcontext() if config.out is None else files.fresh(config.out, "speed") as folder:
        result = _timed(config)
        if folder is not None:
            _write(folder, result)
            result["out"] = str(folder)
    return result


def _timed(config: Config) -> dict:
    """What speed.json holds."""
    import torch

    from worldmodel.commands.policies import Player
    from worldmodel.predictor import Predictor

    torch.set_num_threads(config.threads)
    budget = {name: getattr(config, name) for name in ("samples", "iterations", "horizon", "cameras")}
    played = bench.resolved(bench.Config(out=Path("."), model=config.model, seed=config.seed, threads=config.threads, **budget))
    player = Player(played)
    if not isinstance(player.model.predictor, Predictor):
        raise ValueError(f"{played.model} has a predictor of others; `worldmodel energy` says what planning with it costs")
    steps = [
        lambda: machine(config.threads),
        lambda: decisions(player, config),
        lambda: rollouts(player.model, played.samples, played.horizon),
        lambda: {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)},
    ]
    steps += [lewm, vjepa2_ac] if config.peers else []
    steps += [lambda: {"growth": grown(player.model, played)}] if config.growth else []
    steps += [lambda: training(player.model), collecting, lambda: several(player), lambda: playing(played)] if config.training else []
    result = {"model": str(played.model), "samples": played.samples, "iterations": played.iterations, "horizon": played.horizon}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # of random weights and inputs, whose values no time depends on
        for step in tqdm(steps, desc="speed", unit="part"):
            result |= step()
    player.close()
    _add_ratios(result)
    return result


def machine(threads: int) -> dict:
    """The processor, and its peak in dense matrix products, GFLOP/s per precision: by torch's own, or as 1 x 1 convolutions.

    These are oneDNN's in float32 as well, where MKL leaves half of an AMD's AVX-512 idle.
    """
    import torch
    import torch.nn.functional as F

    about, peak = Path("/proc/cpuinfo"), {}
    flags = about.read_text() if about.exists() else ""
    name = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), "unknown")
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    for precision in (torch.float32, torch.bfloat16):
        best = 0.0
        for n in (512, 1024, 2048):
            a = torch.randn(n, n).to(precision)
            picture = a.view(1, n, 32, n // 32).contiguous(memory_format=torch.channels_last)
            ways = (lambda a=a: a @ a), (lambda a=a, x=picture: F.conv2d(x, a[..., None, None]))
            seconds = [timed(way, best=True) for way in ways]
            best = max(best, 2 * n**3 / min(seconds) / 1e9)
            if max(seconds) > 0.1:  # the next product is eight times as much, and some processors do not know bfloat16
                break
        peak[str(precision).removeprefix("torch.")] = best
    return {
        "processor": name, "cores": os.cpu_count(), "units": units, "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads, "precision": precision_used(), "peak_gflops": peak,
    }  # fmt: skip


class Clock:
    """Seconds spent inside functions, by name, while it is on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.on = False

    def of(self, name: str, work: Callable) -> Callable:
        """The same function, timed."""
        self.spent[name] = 0.0

        def watched(*args, **kwargs):
            start = time.perf_counter()
            result = work(*args, **kwargs)
            self.spent[name] += (time.perf_counter() - start) * self.on
            return result

        return watched


@dataclass
class WatchedGate:
    """A gate, timed."""

    judge: Callable


def decisions(player, config: Config) -> dict:
    """Time of decisions in episodes, seconds, and the share of it that its parts take."""
    from planners.gate import Limits

    agent, clock, taken = player.agent, Clock(), []
    world, act = agent.model, agent.act
    agent.gate = WatchedGate(clock.of("gate", player.gate_of(Limits()).judge))  # judges all, refuses nothing that is sane
    world.encode, world.rollout = clock.of("encode", world.encode), clock.of("imagine", world.rollout)

    def acting(obs):
        clock.on = True
        action = act(obs)
        clock.on = False
        return action

    agent.act = acting
    for seed in range(config.seed, config.seed + config.decisions):
        steps: list[dict] = []
        player.play(seed, steps)
        taken += [step["seconds"] for step in steps]
        if len(taken) >= config.decisions:
            break
    shares = {name: seconds / sum(taken) for name, seconds in clock.spent.items()}
    return {
        "decisions": len(taken),
        "decision_seconds": {"median": float(np.median(taken)), "p95": float(np.percentile(taken, 95))},
        "decision_shares": {**shares, "rest": 1 - sum(shares.values())},
    }


def rollouts(world, samples: int, horizon: int) -> dict:
    """How fast the model encodes and imagines, a search's candidates and many times as many: frames/s, candidate-steps/s, GFLOP/s."""
    import torch

    size = world.encoder.config.image_size
    frames = torch.randint(0, 256, (64, size, size * world.encoder.config.views, 3), dtype=torch.uint8)
    result = {"imagined_by": world.imagined_by, "encoder_fps": len(frames) / timed(lambda: world.encoder.encode(frames))}
    sizes = {"": samples, "many_": MANY * samples}
    works = {prefix: functools.partial(world.rollout, *problem(world, n, horizon)) for prefix, n in sizes.items()}
    wanted, world.compiled = world.compiled, False  # only torch's operations can be counted, and its time is what others' is compared with
    try:
        plain = {prefix: (counted(work), timed(work)) for prefix, work in works.items()}
    finally:
        world.compiled = wanted
    for prefix, work in works.items():
        (operations, usual), seconds = plain[prefix], timed(work)
        result[f"{prefix}times_torch"] = usual / seconds
        result[f"{prefix}candidate_steps_per_second"] = sizes[prefix] * horizon / seconds
        result[f"{prefix}rollout_gflops"] = operations / seconds / 1e9
    return result


def problem(world, samples: int, horizon: int, samples_z: int = 1) -> tuple:
    """A context, actions and z to imagine from, of random numbers."""
    import torch

    from worldmodel.interface import Context, Features

    predictor = world.predictor.config
    shape = (1, predictor.context, world.predictor.patches, predictor.feature_dim)
    features = Features(torch.randn(shape), torch.randn(*shape[:2], predictor.proprio_dim))
    context = Context(features, torch.zeros(1, shape[1] - 1, world.action_dim))
    actions = torch.rand(1, samples, horizon, world.action_dim) * 2 - 1
    return context, actions, torch.randn(1, samples, samples_z, horizon, world.latent_dim)


def grown(world, played: bench.Config) -> dict:
    """Seconds of a search, without encoding and judging, along a decade of each of its sizes; and the exponents.

    Tokens are of predictors with random weights on larger grids of patches.
    """
    from worldmodel.encoder import EncoderConfig, VideoEncoder
    from worldmodel.model import LatentModel
    from worldmodel.predictor import Predictor

    samples, horizon = played.samples, played.horizon
    out = {}
    for name, sizes in GROWTH.items():
        seconds = []
        for size in sizes:
            n, h, k, model = samples, horizon, 1, world
            if name == "candidates":
                n = size
            elif name == "horizon":
                h = size
            elif name == "samples of z":
                k = size
            else:
                side = round((size - 1) ** 0.5) * world.predictor.config.merge
                encoder = EncoderConfig(image_size=8 * side, patch_size=8, embed_dim=world.encoder.config.embed_dim, depth=1, num_heads=2)
                predictor = Predictor(replace(world.predictor.config, grid=(side, side)))
                model = LatentModel(VideoEncoder(encoder), predictor)
            context, actions, z = problem(model, n, h, k)
            seconds.append(timed(lambda: model.rollout(context, actions, z), least=3, seconds=0.3))
        exponent = float(np.log(seconds[-1] / seconds[0]) / np.log(sizes[-1] / sizes[0]))
        out[name] = {"sizes": list(sizes), "seconds": seconds, "exponent": exponent}
    return out


def _add_ratios(result: dict) -> None:
    """The shares of the machine's peak, and how much faster a decision is than a plan of others."""
    peak, own = result["peak_gflops"][result["precision"]], result["decision_seconds"]["median"]
    for name in ("rollout", "many_rollout", "pretrain_clips", "train_sequences"):
        if f"{name}_gflops" in result:
            result[f"{name}_share_of_peak"] = result[f"{name}_gflops"] / peak
    for name in ("lewm", "vjepa2_ac"):
        if name in result:
            result[name]["times_slower"] = result[name]["plan_seconds"] / own


def _write(folder: Path, result: dict) -> None:
    with files.replacing(folder / "speed.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    if "growth" in result:
        with files.replacing(folder / "growth.png") as file:
            _plot(result["growth"]).savefig(file, format="png")


def _plot(growth: dict):
    """Seconds of a search's iteration along each size, and a straight line through the first point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure((3.2 * len(growth), 3.2), layout="constrained", dpi=110)
    for axes, (name, row) in zip(np.atleast_1d(figure.subplots(1, len(growth))), growth.items()):
        sizes, seconds = np.array(row["sizes"]), np.array(row["seconds"])
        axes.loglog(sizes, 1000 * seconds, marker="o", label="measured")
        axes.loglog(sizes, 1000 * seconds[0] * sizes / sizes[0], ls=":", color="grey", label="linear")
        axes.set(title=f"exponent {row['exponent']:.2f}", xlabel=name)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("ms for one batch of plans")
    figure.axes[0].legend()
    return figure


def report(result: dict) -> str:
    """The same as a table."""
    seconds, peak, precision = result["decision_seconds"], result["peak_gflops"], result["precision"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["decision_shares"].items())
    rows = {
        "processor": f"{result['processor']}, {result['cores']} cores, {' '.join(result['units'])}; {result['threads']} threads, {result['capability']}",
        "peak": ", ".join(f"{name} {value:.0f}" for name, value in peak.items()) + f" GFLOP/s; models use {precision}, and imagine by {result['imagined_by']}",
        "encoder": f"{result['encoder_fps']:.0f} frames/s",
        **{
            f"{told} candidates": f"{result[f'{prefix}candidate_steps_per_second']:.0f} candidate-steps/s, "
            f"{result[f'{prefix}rollout_gflops']:.0f} GFLOP/s, {result[f'{prefix}rollout_share_of_peak']:.0%} of the peak"
            + (f", {result[f'{prefix}times_torch']:.1f} times as fast as torch" if result["imagined_by"] != "torch" else "")
            for prefix, told in (("", f"imagining {result['samples']}"), ("many_", f"  {MANY * result['samples']}"))
        },
        "decision": f"{1000 * seconds['median']:.0f} ms median, {1000 * seconds['p95']:.0f} ms 95th percentile of {result['decisions']}, gate on, "
        f"{result['samples']} x {result['iterations']} x {result['horizon']}",
        "  of it": shares,
        "memory": f"{result['memory_gib']:.2f} GiB",
    }
    for name, told in (("lewm", "LeWM's size and budget"), ("vjepa2_ac", "V-JEPA 2-AC's")):
        if name in result:
            row = result[name]
            rows[f"  {told}"] = f"{row['plan_seconds']:.3g} s a plan ({row['parameters'] / 1e6:.1f}M), {row['times_slower']:.3g} times a decision"
    for name, told, unit in (("pretrain_clips", "pretraining", "clips/s"), ("train_sequences", "training", "sequences/s")):
        if f"{name}_gflops" in result:
            rows[told] = f"{result[f'{name}_per_second']:.0f} {unit}, {result[f'{name}_share_of_peak']:.0%} of the peak"
    if "collect_steps_per_second" in result:
        rows["collecting"] = ", ".join(f"{value:.0f} steps/s by {n}" for n, value in result["collect_steps_per_second"].items())
    if "bench_decisions_per_second" in result:
        rows["benchmarking"] = ", ".join(f"{value:.1f} decisions/s by {n}" for n, value in result["bench_decisions_per_second"].items())
    if "decisions_per_second" in result:
        one, many = result["decisions_per_second"].items()
        rows["deciding"] = f"{one[1]:.1f} decisions/s for one environment, {many[1]:.1f} for {many[0]} at once, {many[1] / one[1]:.1f} times as many"
    if "growth" in result:
        rows["growth"] = ", ".join(f"{name} ^{row['exponent']:.2f}" for name, row in result["growth"].items())
    if "out" in result:
        rows["out"] = result["out"]
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in rows.items())
