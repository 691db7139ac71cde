"""Proposals of sub-goals: which frames they are learned from, that they are learned, and that an agent goes through them."""

import numpy as np
import pytest
import torch

from worldmodel import proposer as proposals
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.interface import Features
from worldmodel.model import LatentModel, holds, load
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.propose import ProposalConfig, draw_lessons, fit_hands, judge_hands, keyframes, propose_losses
from worldmodel.proposer import Proposer, ProposerConfig

SIZES = ProposerConfig(feature_dim=12, grid=(2, 2), proprio_dim=3, merge=1, embed_dim=24, depth=1, num_heads=1)


def made() -> Proposer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Proposer(SIZES)


def episode(commands: str) -> tuple[np.ndarray, np.ndarray]:
    """Actions and proprioception of a gripper that is told to close (-), open (+) or nothing; it takes two steps to close."""
    told = {"-": -1.0, "+": 1.0, ".": 0.0}
    actions = np.array([[0.0, told[c]] for c in commands], np.float32)
    opening, wanted, width = [0.08], 0.08, 0.045
    for c in commands:
        wanted = {"-": width, "+": 0.08}.get(c, wanted)
        opening.append(max(wanted, opening[-1] - 0.02) if wanted < opening[-1] else wanted)
    return actions, np.array([[0.0, o] for o in opening], np.float32)


@pytest.mark.parametrize(
    ("commands", "wanted"),
    [
        ("..-.....+..", (0, 4, 8, 11)),  # closed on something at 4, about to open at 8
        (".-..+..-....+..", (5, 9, 12, 15)),  # of two grasps the last, from the first one's end on
        (".-....+...-..", (0, 3, 6, 10)),  # and until the next
        ("......", None),
        ("..-....", (0, 4, 7, 7)),  # never lets go
        (".....-", None),  # never gets to rest
        ("..+....", None),  # never closes
        ("..-+....", None),  # opens before it is at rest
    ],
)
def test_keyframes_are_the_last_grasp(commands, wanted):
    assert keyframes(*episode(commands)) == wanted


def test_it_learns_what_lies_between():
    """Frames are a number each: the present's, the goal's; the keyframes are the one and the other."""
    proposer, rng = made(), np.random.default_rng(0)
    values = rng.normal(size=(400, 12)).astype(np.float32)
    features = np.repeat(values[:, None], 4, 1)  # [F, P, D]
    features = (features - features.mean(-1, keepdims=True)) / features.std(-1, keepdims=True)
    features = features.reshape(100, 4, 4, 12)
    features[:, 1], features[:, 2] = features[:, 0], features[:, 3]
    features = features.reshape(400, 4, 12)
    rows = np.arange(400).reshape(100, 4)
    rows[:, 3] = rows[:, 2] + 1
    proprio = features[:, 0, :3].copy()
    optimizer = torch.optim.Adam(proposer.parameters(), 3e-3)
    losses = []
    for _ in range(400):
        loss = propose_losses(proposer, *draw_lessons(features, proprio, rows[rng.integers(100, size=32)], rng, "cpu"))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    before = judge_hands(proposer, features, proprio, rows)
    fit_hands(proposer, features, proprio, rows, ProposalConfig(draws=2, epochs=60))
    after = judge_hands(proposer, features, proprio, rows)
    assert all(after[name] < 0.5 * before[name] for name in ("place_closed", "place_opens"))


def test_proposals_end_with_the_goal():
    now, goal = Features(torch.randn(4, 12), torch.zeros(3)), Features(torch.randn(4, 12), torch.ones(3))
    found = made().eval().propose(now, goal)
    assert len(found) == proposals.COUNT + 1 and found[-1] is goal
    assert all(f.patches.shape == (4, 12) and f.proprio.shape == (3,) for f in found)


def test_a_model_keeps_its_proposer(tmp_path):
    sizes = EncoderConfig(image_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
    parts = VideoEncoder(sizes), Predictor(PredictorConfig(12, (2, 2), 3, embed_dim=12, depth=1, num_heads=1))
    LatentModel(*parts, proposer=made()).save(tmp_path / "with.safetensors")
    LatentModel(*parts).save(tmp_path / "without.safetensors")
    again = load(tmp_path / "with.safetensors").proposer
    assert all(torch.equal(a, b) for a, b in zip(made().state_dict().values(), again.state_dict().values(), strict=True))
    assert holds(tmp_path / "with.safetensors", "proposer") and not holds(tmp_path / "without.safetensors", "proposer")
    assert load(tmp_path / "without.safetensors").proposer is None
