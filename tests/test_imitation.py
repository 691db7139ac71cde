"""Policies that imitate: what they learn from, and that they learn."""

import numpy as np
import torch

from worldmodel import imitation
from worldmodel.data import Frames
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.interface import Features


def policy(width: int = 16) -> imitation.GoalPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(EncoderConfig(image_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1))
        return imitation.GoalPolicy(encoder, 3, 4, width)


def test_a_policy_learns_which_way_a_goal_is_and_when_to_close():
    made, generator = policy(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*made.look.parameters(), *made.act.parameters()], 3e-3)
    losses = []
    for _ in range(250):
        now, goal = torch.randn(2, 64, 4, 12, generator=generator)
        proprio = torch.randn(64, 3, generator=generator)
        actions = torch.cat(((goal - now).mean(1)[:, :3].clamp(-1, 1), proprio[:, :1].sign()), 1)
        loss = made.loss(Features(now, proprio), goal, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.35 * np.mean(losses[:5])


def test_a_choice_is_an_action_and_repeats_with_its_generator():
    made = policy()
    now, goal = Features(torch.randn(4, 12), torch.zeros(3)), torch.randn(4, 12)
    action = made.choose(now, goal, torch.Generator().manual_seed(1))
    assert action.shape == (4,) and action.abs().max() <= 1 and float(action[-1]) in (-1.0, 0.0, 1.0)
    assert torch.equal(action, made.choose(now, goal, torch.Generator().manual_seed(1)))


def test_save_then_load_is_exact(tmp_path):
    made = policy()
    made.save(tmp_path / "policy.safetensors", {})
    again = imitation.load(tmp_path / "policy.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.action_dim == 4


def test_goals_in_hindsight_lie_ahead_in_the_same_episode():
    frames = Frames({"proprio": np.zeros((15, 3))}, np.array([0, 5, 15]), ("one", "other"))
    now, goal = imitation.hindsight(frames, 500, 3, np.random.default_rng(0))
    assert (frames.episode_of[now] == frames.episode_of[goal]).all()
    assert set(goal - now) == {1, 2, 3}
    assert set(now) == {0, 1, 2, 3, *range(5, 14)}  # all but the last frames
