"""What `worldmodel examine` measures, on data whose answers are known."""

import json

import numpy as np
import pytest
import torch

from worldmodel.commands import cli, dynamics, landscape
from worldmodel.commands.dynamics import Recorded
from worldmodel.commands.landscape import Landscape
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.interface import Context, Features
from worldmodel.model import LatentModel
from worldmodel.predictor import Predictor, PredictorConfig

P, D, S, A = 16, 24, 7, 4


@pytest.fixture(scope="module")
def world() -> LatentModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(EncoderConfig(patch_size=24, embed_dim=D, depth=1, num_heads=1))
        return LatentModel(encoder, Predictor(PredictorConfig(D, (4, 4), embed_dim=24, depth=1, num_heads=1)))


def recorded(steps: int = 12, seed: int = 0, rise: float = 0.0) -> Recorded:
    """An episode in which the hand closes on frame 2 and goes up by 2 cm a step from frame 4 on, the object by `rise`."""
    g = torch.Generator().manual_seed(seed)
    up = np.clip(np.arange(steps + 1) - 4, 0, None)[:, None] * [0, 0, 0.02]
    actions, opening = torch.zeros(steps, A), np.full(steps + 1, 0.08)
    actions[2, 3], opening[3:] = -1, 0.04
    shown = np.zeros((steps + 1, P))
    shown[:, 5] = 1
    return Recorded(
        torch.randn(steps + 1, P, D, generator=g), torch.randn(steps + 1, S, generator=g), actions, shown, shown,
        up + [0.5, 0, 0.02], rise * up + [0.5, 0, 0.02], opening,
    )  # fmt: skip


def changed(e: Recorded, **values) -> Recorded:
    return Recorded(**vars(e) | values)


def test_a_grasp_is_a_closing_near_the_object_and_a_rise():
    e = recorded()
    assert dynamics.sequences(e) == [(2, 7)]
    assert dynamics.sequences(changed(e, place=e.place + [0.1, 0, 0])) == []  # closed far from it
    assert dynamics.sequences(changed(e, place=e.place - [0, 0, 0.1])) == []  # and above it
    assert dynamics.sequences(changed(e, opening=np.full(13, 0.04))) == []  # was closed before
    actions = e.actions.clone()
    actions[5, 3] = 1
    assert dynamics.sequences(changed(e, actions=actions)) == []  # opened on the way


def test_a_model_in_which_nothing_rises_is_right_about_what_was_missed(world):
    told = dynamics.grasps(world, [recorded(rise=1.0), recorded(seed=1), recorded(seed=2)], lambda patches: 0.0)
    assert (told["held"]["share"], told["missed"]["share"], told["all"]["right"]) == (0, 1, 2)
    assert dynamics.grasps(world, [changed(recorded(), opening=np.zeros(13))], lambda patches: 0.0) == {}


def test_imagined_futures_are_those_of_a_rollout_from_each_start(world):
    episodes = [recorded(seed=seed) for seed in range(2)]
    episodes = [changed(e, actions=torch.rand(12, A, generator=torch.Generator().manual_seed(3))) for e in episodes]
    starts = [(1, 6), (0, 0), (1, 1), (0, 10)]
    for (i, t), patches in zip(starts, dynamics.imagine(world, episodes, starts, 4)):
        e, first = episodes[i], max(0, t - world.max_context + 1)
        context = Context(Features(e.patches[None, first : t + 1], e.proprio[None, first : t + 1]), e.actions[None, first:t])
        taken = torch.zeros(1, 1, 4, A)
        taken[0, 0, : len(e.actions) - t] = e.actions[t : t + 4]
        wanted = world.rollout(context, taken, torch.zeros(1, 1, 1, 4, world.latent_dim)).patches[0, 0, 0]
        assert torch.allclose(patches, wanted, atol=1e-5)


def test_open_loop_tells_copying_apart_from_imagining_and_where(world):
    still = recorded(steps=30)
    still = changed(still, patches=still.patches[:1].expand(31, P, D).clone())
    still.patches[:, 5] += torch.linspace(0, 3, 31)[:, None]  # only what is shown changes
    told = dynamics.open_loop(world, [still])
    assert np.allclose(told["the robot"]["copied"], 0.1 * np.arange(1, 11), atol=1e-4)
    assert np.allclose(np.array(told["anything"]["copied"]) * P, told["the robot"]["copied"], atol=1e-4)
    assert np.isnan(told["a moved object"]["copied"]).all() and np.isfinite(told["the object"]["imagined"]).all()


def test_patches_take_their_share_of_what_is_shown():
    shown = np.zeros((1, 8, 16), bool)
    shown[0, :2, :4] = shown[0, 7, 15] = True
    assert dynamics.pooled(shown, (2, 4)).reshape(2, 4).tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 1 / 16]]
    assert np.allclose(dynamics.pooled(np.ones((2, 32, 32)), (14, 14)), 1)


def test_minima_of_a_cone_are_where_they_should_be():
    offsets, moves, commands = np.arange(-15, 15) / 100 + 0.003, np.linspace(-0.05, 0.05, 21), np.linspace(-1, 1, 9)
    ray, wanted = abs(offsets), np.array([0.02, -0.01])
    ray[:12] = np.nan  # behind it the workspace ends
    bumpy = np.where(np.arange(30) == 20, 0, ray)
    plane = np.hypot(moves[:, None] - wanted[0], moves[None] - wanted[1])
    one = Landscape(
        offsets, {("hand", "patches", "x"): ray, ("hand", "patches", "y"): bumpy}, moves,
        {("hand", "patches", "xy"): plane}, {("hand", "patches", "xy"): wanted}, commands,
        {("close on the object", "patches"): 1 + 0.9 * commands, ("wait above it", "patches"): 1 + 0.1 * commands},
    )  # fmt: skip
    told = landscape.minima([one])
    x, y = told["states"]["hand, patches, x"], told["states"]["hand, patches, y"]
    assert (round(x["median_mm"]), x["rays"], x["rising"]) == (3, 1, 1.0)
    assert (round(y["median_mm"]), y["rising"]) == (53, 0.0)
    assert told["actions"]["hand, patches, xy"]["median_mm"] < 1e-6
    assert told["gripper"] == {"close on the object, patches": 1.0, "wait above it, patches": 1.0}


def test_the_command_tells_of_dynamics_grasps_and_energy(world, tmp_path, capfd):
    world.save(tmp_path / "model.safetensors")
    flags = ["examine", "--preset", "debug", "--model", str(tmp_path / "model.safetensors")]
    out = tmp_path / "out"
    assert cli.main([*flags, "--out", str(out), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert all(len(row["imagined"]) == len(row["copied"]) == 10 for row in told["open_loop"].values())
    assert len(told["energy"]["states"]) == 8 and len(told["energy"]["actions"]) == len(told["energy"]["gripper"]) == 4
    assert {path.name for path in out.iterdir()} == {"dynamics.png", "energy.png", "examine.json"}
    assert cli.main([*flags, "--goals", "1", "--episodes", "1"]) == 0
    assert "rays that only rise" in capfd.readouterr().out
    for flag, expected in {
        ("--episodes", "0"): "episodes is 0",
        ("--frames", "1"): "frames is 1",
        ("--seed", "5001"): "meet the probe's",
        ("--seed", "-1"): "expected at least 0",
        ("--cameras", "front", "side"): "looks through 1 cameras",
        ("--cameras", "rear"): "unknown cameras",
    }.items():
        assert cli.main([*flags, *flag]) == 2
        assert expected in capfd.readouterr().err
