"""How much gets done in a second: training steps, collected steps, episodes played, decisions for many environments."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

from worldmodel.commands import bench
from worldmodel.commands.others import timed

MANY, FIRST, TIMED = 8, 4, 12  # environments; steps before the clock runs, and while it does


def counted(work: Callable) -> int:
    """Floating-point operations of the matrix products in `work()`; torch does not count fused attention, the encoder's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def packed(x: tuple, weight: tuple, *_, **__) -> int:
        """Of a packed linear map, by the shapes of its input and its weights."""
        return 2 * math.prod(x) * weight[0]

    known = {torch.ops.mkldnn._linear_pointwise: packed} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops()


def training(world) -> dict:
    """Clips/s of pretraining and sequences/s of training, in steps of the presets base and shipped without the optimiser, and GFLOP/s."""
    import torch

    from worldmodel.commands import cli
    from worldmodel.commands import pretrain as pretraining
    from worldmodel.commands import train as predicting
    from worldmodel.encoder import autocast
    from worldmodel.interface import Features
    from worldmodel.masking import KINDS, draw
    from worldmodel.pretrain import Pretraining
    from worldmodel.train import TrainConfig, prediction_losses

    recipe = pretraining.recipe(cli.parse("pretrain", pretraining, [], "base"))
    learner, size, wide = Pretraining(recipe), recipe.encoder.image_size, recipe.drawn[1] * recipe.encoder.patch_size
    clips = torch.randint(0, 256, (recipe.batch, 1, size, wide, 3), dtype=torch.uint8)
    masks = draw(KINDS["open"], recipe.batch, 1, recipe.encoder.grid, np.random.default_rng(0))

    own = TrainConfig(**cli.shared(cli.parse("train", predicting, [], "shipped"), TrainConfig))
    predictor = type(world.predictor)(world.predictor.config)
    sizes, shape = predictor.config, (own.batch, own.transitions)
    clip = Features(
        torch.randn(own.batch, own.transitions + 1, predictor.patches, sizes.feature_dim),
        torch.randn(own.batch, own.transitions + 1, sizes.proprio_dim),
    )
    chance = torch.zeros(*shape, sizes.action_dim), torch.randn(*shape, sizes.latent_dim), torch.zeros(own.batch, dtype=torch.bool)

    def step(losses: Callable) -> None:
        with autocast("cpu"):
            value = losses()["loss"]
        value.backward()

    works = {
        "pretrain_clips": (recipe.batch, lambda: step(lambda: learner.loss(clips, masks))),
        "train_sequences": (own.batch, lambda: step(lambda: prediction_losses(predictor, clip, *chance, own))),
    }
    out = {}
    for name, (count, work) in works.items():
        seconds = timed(work, least=3)
        out |= {f"{name}_per_second": count / seconds, f"{name}_gflops": counted(work) / seconds / 1e9}
    return out


def collecting(episodes: int = 120) -> dict:
    """Rendered steps/s of collecting with one and with two processes."""
    from worldmodel.commands import collect

    out = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            result = collect.run(collect.Config(out=Path(folder, "data"), task="pick-place", episodes=episodes, workers=workers))
            out[str(workers)] = result["steps_per_second"]
    return {"collect_steps_per_second": out}


def playing(config: bench.Config, few: int = 2, many: int = 12) -> dict:
    """Decisions/s, with all that comes with them, of benchmarking with one and with two processes of one thread each.

    Of `many` episodes for each process, less what `few` take: processes have to start.
    """
    out = {}
    for workers in (1, 2):
        seconds, decisions = [], []
        for episodes in (few * workers, many * workers):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                bench.run(dataclasses.replace(config, out=Path(folder, "bench"), episodes=episodes, workers=workers, threads=1))
                seconds.append(time.perf_counter() - start)
                played = json.loads(Path(folder, "bench", "results.json").read_text())["episodes"]
                decisions.append(sum(episode["steps"] for episode in played))
        out[str(workers)] = (decisions[1] - decisions[0]) / (seconds[1] - seconds[0])
    return {"bench_decisions_per_second": out}


def several(player) -> dict:
    """Decisions per second for one environment and for MANY in a `gym.vector`, planned as one batch; stepping does not count."""
    from planners.vector import VectorAgent

    own, out = player.env.config, {}
    for count in (1, MANY):
        envs = gym.make_vec(
            "envs:PandaPickPlace-v0", num_envs=count, vectorization_mode="sync", image_size=own.image_size, action_dim=own.action_dim,
            cameras=own.cameras,
        )  # fmt: skip
        try:
            agent = VectorAgent(player.make_agent, player.model, count)
            obs, info = envs.reset(seed=0)
            agent.reset([[{"pixels": goal["pixels"]} for goal in goals] for goals in info["subgoals"]])
            seconds = []
            for _ in range(FIRST + TIMED):
                start = time.perf_counter()
                actions = agent.act(obs)
                seconds.append(time.perf_counter() - start)
                obs, *_ = envs.step(actions)
        finally:
            envs.close()
        out[str(count)] = count / float(np.median(seconds[FIRST:]))
    return {"decisions_per_second": out}
