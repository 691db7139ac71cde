"""Golden values: what fixed inputs gave when this was last run.

    python tests/golden/regenerate.py

makes them anew, after a change that is meant to change them; say in the commit why. The actions of a trajectory are
stored with it and played again by the test, so a change of the experts that they come from changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # also where the packages are not installed

import envs  # noqa: E402
from envs.experts import make_policy  # noqa: E402
from planners.sampling import SamplingConfig, SamplingPlanner  # noqa: E402
from worldmodel.encoder import EncoderConfig, VideoEncoder  # noqa: E402
from worldmodel.interface import Context  # noqa: E402
from worldmodel.model import LatentModel  # noqa: E402
from worldmodel.predictor import Predictor, PredictorConfig  # noqa: E402

TASKS = {"reach": "box", "grasp": "cup", "reach-with-object": "cup", "pick-place": "box"}
STEPS = 14
SHOWN = (0, STEPS)  # frames whose pictures are kept
METHODS = ("cem", "icem", "mppi")
LEARNED = ("patches", "proprio", "features")


def trajectory(task: str, actions: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Play actions [STEPS, 4], or let a varied expert choose them; positions, proprioception and pictures on the way."""
    env = envs.make(envs.EnvConfig(task, TASKS[task], image_size=48, max_steps=STEPS, stop_on_success=False))
    policy = make_policy("varied", env.config, np.random.default_rng(1))
    obs, info = env.reset(seed=7)
    seen, infos, played = [obs], [info], []
    for t in range(STEPS):
        played.append(policy(info) if actions is None else actions[t])
        obs, _, _, _, info = env.step(played[-1])
        seen.append(obs)
        infos.append(info)
    env.close()
    return {
        "actions": np.stack(played),
        "tcp": np.stack([i["privileged/tcp_pos"] for i in infos]),  # [STEPS + 1, 3] m
        "object": np.stack([i["privileged/object_pos"] for i in infos]),  # [STEPS + 1, 3] m
        "quat": np.stack([i["privileged/object_quat"] for i in infos]),  # [STEPS + 1, 4]
        "proprio": np.stack([o["proprio"] for o in seen]),
        "goal_proprio": infos[0]["goal"]["proprio"],
        "pictures": np.stack([*(seen[t]["pixels"] for t in SHOWN), infos[0]["goal"]["pixels"]]),  # uint8 [3, 48, 48, 3]
    }


def plans() -> dict[str, np.ndarray]:
    """Plans of all methods for the same quadratic: two problems, three steps, three motions and a gripper."""
    generator = torch.Generator().manual_seed(0)
    optimum = torch.rand(2, 1, 3, 4, generator=generator) * 1.6 - 0.8

    def cost(actions: torch.Tensor) -> torch.Tensor:
        return (actions - optimum).square().sum((-2, -1))

    out = {}
    for method in METHODS:
        planner = SamplingPlanner(SamplingConfig(method, 32, 3, 6, std=0.5, hold=0.6, margin=0.05))
        plan = planner.plan(cost, torch.zeros(2, 3, 4), torch.Generator().manual_seed(1))
        out |= {f"{method}_actions": plan.actions.numpy(), f"{method}_cost": plan.cost.numpy()}
    return out


def imagined() -> dict[str, np.ndarray]:
    """What a small model with random weights makes of a noise picture: its features, and two imagined steps."""
    encoder = EncoderConfig(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    predictor = PredictorConfig(24, encoder.grid, latent_dim=2, embed_dim=24, depth=2, num_heads=2)
    with torch.random.fork_rng():
        model = LatentModel(VideoEncoder(encoder), Predictor(predictor))
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():  # all of them: heads begin as zeros
        weights.copy_((1.0 if weights.dim() == 1 else 0.2) * torch.randn(weights.shape, generator=generator))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8)
    features = model.encode({"pixels": pixels, "proprio": rng.normal(size=(1, 2, 7)).astype(np.float32)})
    context = Context(features, torch.rand(1, 1, 4, generator=generator) * 2 - 1)
    actions = torch.rand(1, 2, 2, 4, generator=generator) * 2 - 1
    future = model.rollout(context, actions, model.sample_z((1, 2, 1, 2), generator))
    values = (future.patches, future.proprio, features.patches)
    return {name: value.numpy() for name, value in zip(LEARNED, values, strict=True)}


def main() -> None:
    """Write all of them."""
    for task in TASKS:
        np.savez_compressed(FOLDER / f"{task}.npz", **trajectory(task))
    np.savez_compressed(FOLDER / "plans.npz", **plans())
    np.savez_compressed(FOLDER / "imagined.npz", **imagined())


if __name__ == "__main__":
    main()
