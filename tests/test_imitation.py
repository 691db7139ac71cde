"""Policies that imitate: what they learn from, that they learn, and how a model begins its search with one."""

import numpy as np
import pytest
import torch

from worldmodel.data import Frames
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.imitation import _check_gripper, aimless, estranged, hindsight
from worldmodel.interface import Features
from worldmodel.model import LatentModel, load
from worldmodel.policy import Policy
from worldmodel.predictor import Predictor, PredictorConfig


def made(width: int = 16) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(4, 12, 3, 4, width)


def test_a_policy_learns_which_way_a_goal_is_when_to_close_and_how_far_it_is():
    policy, generator = made(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    losses = []
    for _ in range(250):
        now, goal = torch.randn(2, 64, 4, 12, generator=generator)
        proprio = torch.randn(64, 3, generator=generator)
        actions = torch.cat(((goal - now).mean(1)[:, :3].clamp(-1, 1), proprio[:, :1].sign()), 1)
        loss = policy.loss(Features(now, proprio), goal, actions, 10 + 5 * proprio[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.35 * np.mean(losses[:5])
    steps = policy(Features(now, proprio), goal)[2].detach().numpy()
    assert np.corrcoef(steps, proprio[:, 0].numpy())[0, 1] > 0.9


def test_a_choice_is_an_action_and_repeats_with_its_generator():
    policy = made()
    now, goal = Features(torch.randn(5, 4, 12), torch.zeros(5, 3)), torch.randn(5, 4, 12)
    actions = policy.choose(now, goal, torch.Generator().manual_seed(1))
    assert actions.shape == (5, 4) and actions.abs().max() <= 1 and set(actions[:, -1].tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(actions, policy.choose(now, goal, torch.Generator().manual_seed(1)))
    assert torch.equal(policy.choose(now, goal)[:, -1], policy(now, goal)[1].argmax(1) - 1)  # the likeliest


def test_a_model_suggests_what_its_policy_does_in_what_it_imagines(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(EncoderConfig(image_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1))
        predictor = Predictor(PredictorConfig(feature_dim=12, grid=(2, 2), proprio_dim=3, action_dim=4, embed_dim=12, depth=1, num_heads=1))
    LatentModel(encoder, predictor, policy=made(), careful=made(5)).save(tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    now, goals = Features(torch.randn(2, 4, 12), torch.zeros(2, 3)), [Features(torch.randn(2, 4, 12)) for _ in range(2)]
    both = model.suggest(now, goals, 3)
    one = model.suggest(Features(*(x[1] for x in now)), [Features(goals[1].patches[1])], 3)
    assert both.actions.shape == (2, 3, 4) and both.chooses and both.waypoint.proprio.shape == (2, 3)
    assert torch.equal(both.actions[:, 0], model.policy.choose(now, goals[1].patches))  # on the way to the last one
    for whole, part in ((both.actions, one.actions), (both.waypoint.patches, one.waypoint.patches)):
        assert torch.allclose(whole[1], part, atol=1e-5) and part.dim() == whole.dim() - 1
    assert torch.equal(both.actions[:, :2], model.suggest(now, goals, 2).actions)
    assert model.suggest(Features(now.patches), goals, 3) is None  # it needs the hand's own place
    assert torch.equal(model.detour(now, goals, 1).actions[:, 0], model.careful.choose(now, goals[1].patches))
    assert model.detour(Features(now.patches), goals, 3) is None


def test_the_last_action_is_a_gripper():
    _check_gripper(np.array([[0.3, -1.0], [0.2, 0.0], [0.1, 1.0], [0.0, 0.4]], np.float32))
    for actions in (np.ones((4, 1)), np.full((4, 2), 0.4)):
        with pytest.raises(ValueError, match="expected at least half"):
            _check_gripper(actions.astype(np.float32))


def test_goals_in_hindsight_lie_ahead_in_the_same_episode():
    frames = Frames({"proprio": np.zeros((15, 3))}, np.array([0, 5, 15]), ("one", "other"))
    now, goal = hindsight(frames, 500, 3, np.random.default_rng(0))
    assert (frames.episode_of[now] == frames.episode_of[goal]).all()
    assert set(goal - now) == {1, 2, 3}
    assert set(now) == {0, 1, 2, 3, *range(5, 14)}  # all but the last frames
    again, goal = hindsight(frames, 500, 3, np.random.default_rng(0), 0.5)
    last = frames.offsets[frames.episode_of[again] + 1] - 1
    assert np.array_equal(again, now) and 0.4 < (goal == last).mean() < 0.8 and (goal[goal != last] - now[goal != last] <= 3).all()


def test_the_way_to_an_object_is_that_to_any_goal():
    """Until the gripper first closes, where it ever does: goals may be the last frames of other episodes."""
    actions = np.ones((15, 4), np.float32)
    actions[[2, 4, 6, 8], -1] = 0, -0.4, -1, -1
    frames = Frames({"proprio": np.zeros((15, 3)), "actions": actions}, np.array([0, 5, 15]), ("one", "other"))
    free = aimless(frames)
    assert list(free.nonzero()[0]) == [5, 6]
    now = np.tile(np.arange(14), 100)
    goal, others = estranged(frames, now, now + 1, free, 0.5, np.random.default_rng(0))
    assert set(now[others]) == {5, 6} and 0.3 < others[free[now]].mean() < 0.7
    assert set(goal[others]) == {4, 14} and (goal[~others] == now[~others] + 1).all()


def test_small_motions_count_most_and_unknown_distances_not_at_all(monkeypatch):
    policy, now, goal = made(), Features(torch.randn(8, 4, 12), torch.zeros(8, 3)), torch.randn(8, 4, 12)
    unknown = torch.full((8,), torch.nan)
    loss = policy.loss(now, goal, torch.ones(8, 4), unknown, 0.1)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in policy.parameters())
    monkeypatch.setattr(policy, "forward", lambda now, goal: (torch.full((8, 3), said), torch.zeros(8, 3), torch.zeros(8)))
    costs = []
    for log_above in (0.0, 0.1):
        for said in (0.0, 0.9):
            off = (policy.loss(now, goal, torch.full((8, 4), told), unknown, log_above) for told in (said, said + 0.01))
            costs.append(float(torch.stack(list(off)).diff().abs()))
    assert costs[0] == pytest.approx(costs[1], abs=1e-6) and costs[2] > 5 * costs[3] > 0
