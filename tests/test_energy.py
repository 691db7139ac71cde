"""Energies: their values, their options, and what they refuse."""

import pytest
import torch

from worldmodel.energy import EnergyConfig, GoalEnergy
from worldmodel.interface import Features

B, N, K, H, P, D, S, A = 2, 3, 4, 5, 6, 7, 3, 4
LAST = EnergyConfig(horizon="last")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def imagined():
    return Features(drawn(B, N, K, H, P, D), drawn(B, N, K, H, S, seed=1))


def actions():
    return drawn(B, N, H, A, seed=2).clamp(-1, 1)


def test_shape_and_value_of_each_distance():
    seen, goal = imagined(), Features(drawn(B, P, D, seed=3))
    last, wanted = seen.patches[:, :, :, -1], goal.patches[:, None, None]
    by_hand = {
        "l1": (last - wanted).abs().mean((-2, -1)),
        "l2": (last - wanted).square().mean((-2, -1)),
        "cosine": (1 - (last * wanted).sum(-1) / last.norm(dim=-1) / wanted.norm(dim=-1)).mean(-1),
    }
    for name, value in by_hand.items():
        energy = GoalEnergy(goal, EnergyConfig(name, "last"))(seen, actions())
        assert energy.shape == (B, N, K)
        torch.testing.assert_close(energy, value)


def test_zero_at_the_goal_and_the_same_goal_for_all_problems():
    seen = imagined()
    for distance in ("l1", "l2", "cosine"):
        goal = Features(seen.patches[0, 0, 0, -1], seen.proprio[0, 0, 0, -1])
        energy = GoalEnergy(goal, EnergyConfig(distance, "last"))(seen, actions())
        assert abs(energy[0, 0, 0]) < 1e-6 and energy[1].min() > 0.1
        one = GoalEnergy(Features(goal.patches[None], goal.proprio[None]), EnergyConfig(distance, "last"))
        assert torch.equal(one(seen, actions()), energy)


def test_sum_over_the_horizon_weighs_the_last_most():
    seen, goal = imagined(), Features(drawn(P, D, seed=3))
    each = torch.stack([
        GoalEnergy(goal, LAST)(Features(seen.patches[:, :, :, : h + 1]), actions()[:, :, : h + 1]) for h in range(H)
    ], -1)  # fmt: skip
    energy = GoalEnergy(goal, EnergyConfig(horizon="sum", discount=0.5))(seen, actions())
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]) / 31
    torch.testing.assert_close(energy, (each * weights).sum(-1))
    mean = GoalEnergy(goal, EnergyConfig(horizon="sum", discount=1.0))(seen, actions())
    torch.testing.assert_close(mean, each.mean(-1))


def test_proprioception_counts_where_the_goal_has_it():
    seen, wanted = imagined(), drawn(B, S, seed=4)
    pixels = GoalEnergy(Features(drawn(P, D, seed=3)), LAST)(seen, actions())
    goal = Features(drawn(1, P, D, seed=3), wanted)
    both = GoalEnergy(goal, EnergyConfig(horizon="last", proprio_weight=0.5, proprio_scale=(1.0, 2.0, 4.0)))(seen, actions())
    scaled = (seen.proprio[:, :, :, -1] - wanted[:, None, None]).abs() / torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(both - pixels, 0.5 * scaled.mean(-1))
    assert torch.equal(GoalEnergy(goal, EnergyConfig(horizon="last", proprio_weight=0.0))(seen, actions()), pixels)


def test_effort_and_patch_weights():
    seen, goal, moves = imagined(), Features(drawn(P, D, seed=3)), actions()
    plain = GoalEnergy(goal)(seen, moves)
    effort = GoalEnergy(goal, EnergyConfig(effort_weight=2.0))(seen, moves)
    torch.testing.assert_close(effort - plain, (2 * moves.square().mean((-2, -1)))[:, :, None].expand(B, N, K))
    weights = torch.tensor([6.0, 0, 0, 0, 0, 0])
    weighted = GoalEnergy(goal, LAST, weights)(seen, moves)
    torch.testing.assert_close(weighted, (seen.patches[:, :, :, -1, 0] - goal.patches[0]).abs().mean(-1))


def test_wrong_shapes_are_refused():
    seen, goal = imagined(), Features(drawn(P, D))
    for wrong in (Features(drawn(P + 1, D)), Features(drawn(P, D + 1)), Features(drawn(D))):
        with pytest.raises(ValueError, match="encode the goal with the model that imagines"):
            GoalEnergy(wrong)(seen, actions())
    with pytest.raises(ValueError, match="3 goals for 2 problems"):
        GoalEnergy(Features(drawn(3, P, D)))(seen, actions())
    with pytest.raises(ValueError, match=r"expected actions \[2, 3, 5, A\]"):
        GoalEnergy(goal)(seen, actions()[:, :, :2])
    with pytest.raises(ValueError, match="imagined features have none"):
        GoalEnergy(Features(drawn(P, D), drawn(S)))(Features(seen.patches), actions())
    with pytest.raises(ValueError, match="proprio_scale has 2 entries, expected 3"):
        GoalEnergy(Features(drawn(P, D), drawn(S)), EnergyConfig(proprio_scale=(1.0, 1.0)))(seen, actions())


@pytest.mark.parametrize("fields", [{"distance": "l3"}, {"horizon": "first"}, {"discount": 0.0}, {"effort_weight": -1.0},
                                    {"proprio_scale": (1.0, 0.0)}])  # fmt: skip
def test_bad_configs_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        EnergyConfig(**fields)
