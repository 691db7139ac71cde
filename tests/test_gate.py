"""The gate: what it refuses whatever its limits, what it measures, and that calibrated limits hold on fresh decisions."""

import json
import math

import numpy as np
import pytest
import torch

import envs
from envs.experts import make_policy
from envs.run import rollout
from planners.gate import Limits, SafetyGate, conformal_limit, controlled_limit, spread
from planners.interface import Plan, Seen
from planners.past import Past
from worldmodel import model
from worldmodel.checkpoint import load_tensors, save_tensors
from worldmodel.commands import abstention, calibrate, cli
from worldmodel.commands.actors import RandomGate
from worldmodel.density import Density
from worldmodel.interface import Features

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def futures(k: int = 4, h: int = 2, apart: float = 0.1) -> Features:
    rng = torch.Generator().manual_seed(0)
    return Features(torch.ones(k, h, 3, 5) + apart * torch.randn(k, h, 3, 5, generator=rng), torch.zeros(k, h, 2))


def judged(gate: SafetyGate = SafetyGate(Limits()), imagined: Features | None = None, actions=0.5, **seen):
    plan = Plan(torch.full((1, 2, 2), actions), torch.zeros(1), torch.zeros(1, 2, 2))
    now = Features(torch.ones(3, 5), torch.zeros(2))
    return gate.judge(plan, imagined or futures(), Seen(**{"now": now, "goal": now, "pixels": PICTURE, **seen}))


def test_what_is_in_order_goes():
    verdict = judged()
    assert verdict.go and verdict.score == 0 and "within all limits" in verdict.why
    assert "surprise and novelty" in judged(SafetyGate(Limits(), sampled=False), futures(apart=0.0)).why  # a deterministic model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"now": Features(torch.full((3, 5), math.nan))}, "NaN"),
        ({"now": Features(torch.ones(3, 5), torch.tensor([math.inf, 0]))}, "NaN or infinity"),
        ({"goal": Features(torch.full((3, 5), math.inf))}, "NaN or infinity"),
        ({"imagined": Features(torch.full((4, 2, 3, 5), math.nan))}, "NaN"),
        ({"actions": math.nan}, "NaN"),
        ({"pixels": np.zeros((8, 8, 3), np.uint8)}, "shows nothing"),
        ({"pixels": np.concatenate((PICTURE, np.full((8, 8, 3), 90, np.uint8)), 1), "views": 2}, "a camera shows nothing"),
        ({"still": 2}, "stands still: the last 3 pictures"),
        ({"imagined": futures(apart=0.0)}, "z has no effect"),
        ({"gate": SafetyGate(Limits(mismatch=0.05)), "off": torch.tensor([0.0, math.nan])}, "mismatch is not a finite number"),
        ({"gate": SafetyGate(Limits(novelty=1.0), novelty=lambda patches: torch.tensor(math.nan))}, "novelty is not a finite number"),
    ],
)
def test_it_cannot_be_talked_past(change, why):
    verdict = judged(**change)
    assert not verdict.go and why in verdict.why and verdict.score == math.inf


def test_chance_refuses_a_decision_as_a_whole_and_as_often_as_it_is_told():
    gate, told = RandomGate(0.3, seed=0), []
    for t in range(400):  # a hand that holds still: the same picture, but each time another z
        expected = Features(torch.full((1, 3, 5), float(t)))
        first, second = (judged(gate, futures(apart=apart), expected=expected).go for apart in (0.1, 0.2))
        assert first == second
        told.append(first)
    assert 0.62 < np.mean(told) < 0.78


def test_each_signal_has_its_own_limit_and_is_named():
    now = Features(torch.ones(3, 5))
    expected = Features(torch.stack((torch.zeros(3, 5), torch.full((3, 5), 0.7))))  # the nearer one is 0.3 off
    novelty = lambda patches: patches.max() * 2  # noqa: E731
    hazard = lambda context, imagined, actions: torch.tensor([[[[0.1, 0.9], [0.4, 0.9]]]])[..., : actions.shape[2]]  # noqa: E731
    gate = SafetyGate(Limits(), hazard, novelty)
    plan = Plan(torch.zeros(1, 2, 2), torch.zeros(1), torch.zeros(1, 2, 2))
    values = gate.signals(plan, futures(k=2), Seen(now, Features(3 * torch.ones(3, 5)), PICTURE, expected))
    assert values["hazard"] == pytest.approx(0.4) and values["surprise"] == pytest.approx(0.3)
    assert (values["novelty"], values["goal_novelty"]) == (2.0, 6.0)
    assert values["doubt"] == pytest.approx(spread(futures(k=2).patches[:, :1]))
    for name, limit, word in (("hazard", 0.39, "go wrong"), ("surprise", 0.29, "unlike anything"), ("doubt", 0.01, "far apart"),
                              ("novelty", 5.0, "the goal's picture")):  # fmt: skip
        verdict = judged(SafetyGate(Limits(**{name: limit}), hazard, novelty), futures(k=2), goal=Features(3 * torch.ones(3, 5)), expected=expected)
        assert not verdict.go and word in verdict.why and verdict.score > 1
    late = judged(SafetyGate(Limits(mismatch=0.05)), off=torch.tensor([0.01, -0.06]))
    assert not late.go and "does not show the robot where it feels itself" in late.why and late.signals["mismatch"] == pytest.approx(0.06)
    assert judged(SafetyGate(Limits(mismatch=0.05)), off=torch.tensor([0.01, -0.04])).go
    assert "the picture is unlike" in judged(SafetyGate(Limits(novelty=1.9), novelty=novelty)).why
    assert judged(SafetyGate(Limits(hazard=0.41, surprise=0.31, doubt=1.0, novelty=6.1), hazard, novelty), futures(k=2), expected=expected).go
    with pytest.raises(ValueError, match="the limit of doubt is 0"):
        Limits(doubt=0.0)


def test_what_is_usual_for_another_model_is_told_apart_by_its_size():
    with pytest.raises(ValueError, match=r"expected features of \[3, 4\].*got \[3, 5\]; fit or calibrate it with this model"):
        judged(SafetyGate(Limits(novelty=1.0), novelty=Density(torch.zeros(3, 4), torch.ones(3, 4))))


def test_conformal_limits_hold_on_fresh_scores():
    rng = np.random.default_rng(0)
    passed = []
    for _ in range(300):
        limit = conformal_limit(list(rng.exponential(size=99)), 0.1)
        passed.append((rng.exponential(size=50) > limit).mean())
    assert abs(np.mean(passed) - 0.1) < 0.01
    assert conformal_limit([1.0, 2.0], 0.1) == math.inf  # too few to tell
    assert conformal_limit([3.0, 1.0, 2.0], 0.5) == 2.0


def episode(rng, count: int, length: int = 20):
    """Episodes whose decisions are alike: scores [count, length], and events, the likelier the higher the score."""
    scores = (rng.uniform(size=(count, 1)) + 0.2 * rng.uniform(size=(count, length))).clip(0, 1)
    return scores, rng.uniform(size=(count, length)) < scores


@pytest.mark.parametrize("risk", [0.05, 0.2])
def test_controlled_limits_keep_the_risk_on_fresh_decisions(risk):
    rng, realised, going = np.random.default_rng(0), [], []
    for _ in range(200):
        scores, events = episode(rng, 100)
        limit = controlled_limit(scores.tolist(), events.tolist(), risk)
        fresh, happened = episode(rng, 200)
        realised.append((happened & (fresh <= limit)).mean())
        going.append((fresh <= limit).mean())
    assert risk - 0.03 < np.mean(realised) <= risk + 0.002
    assert np.mean(going) > 0.1
    assert controlled_limit([[0.1], [0.2]], [[True], [True]], 0.05) == 0.0
    assert controlled_limit([[0.1, 0.2]] * 100, [[False, False]] * 100, 0.05) == math.inf
    half = [[0.1, 0.9]] * 99
    assert controlled_limit(half, [[False, True]] * 99, 0.05) == 0.1


def test_what_a_gate_was_worth():
    asked = [[0.1, 1, 0], [0.2, 1, 1], [0.9, 0, 1], [0.8, 0, 0], [0.3, 1, 0]]  # score, let go, went wrong
    episodes = [{"asked": asked[:2], "answers": ["plan", "plan"]}, {"asked": asked[2:], "answers": ["hold", "cautious plan", "plan"]}]
    told = abstention.rates(episodes)
    assert told["refusal_rate"] == 0.4 and told["abstention_rate"] == 0.2 and told["let_go_and_wrong"] == 0.2
    assert told["episode_risk"] == pytest.approx((1 / 2 + 0 / 3) / 2)  # an episode's share, however long it is
    assert told["false_alarm_rate"] == pytest.approx(1 / 3) and told["auroc"] == pytest.approx(4 / 6)
    curve = abstention.risk_coverage(episodes)
    assert np.allclose(curve, [[0.2, 0], [0.4, 1 / 2], [0.6, 1 / 3], [0.8, 1 / 4], [1, 2 / 5]])
    unknown = abstention.rates([{"asked": [[0.5, 0, None], [0.1, 1, 0]], "answers": ["hold", "plan"]}])
    assert unknown["refusal_rate"] == 0.5 and unknown["false_alarm_rate"] is unknown["auroc"] is None
    assert set(abstention.rates([{}]).values()) == {None}


def test_a_calibration_tells_the_risk_that_it_bounds():
    well, wrong = ({"hazard": h, "doubt": 0.0, "surprise": 0.0, "novelty": 0.0, "mismatch": 0.0, "unsafe": h > 0.5} for h in (0.1, 0.6))
    episodes = [[well] * 3 + [wrong], [], [well] * 36 + [wrong] * 4]
    others = dict.fromkeys(("doubt", "surprise", "novelty", "mismatch"), 1.0)
    told = calibrate.judged(episodes, {"hazard": 0.7, **others})
    assert told["let_go_and_wrong"] == pytest.approx(5 / 44) and told["episode_risk"] == pytest.approx((1 / 4 + 1 / 10) / 2)
    assert calibrate.judged(episodes, {"hazard": 0.5, **others})["episode_risk"] == 0


@pytest.mark.parametrize(("alarm", "limit"), [(0.0, 9.0), (0.5, 5.0)])
def test_what_nothing_that_went_well_came_to_is_refused_whatever_the_alarm(alarm, limit):
    episodes = [[{"hazard": 0.1, **dict.fromkeys(calibrate.SIGNALS[1:], float(i)), "unsafe": False}] for i in range(1, 10)]
    episodes.append([{"hazard": 0.9, **dict.fromkeys(calibrate.SIGNALS[1:], 50.0), "unsafe": True}])
    limits = calibrate.limits_for(episodes, 0.2, alarm)
    assert set(limits) == set(calibrate.SIGNALS) and {limits[name] for name in calibrate.SIGNALS[1:]} == {limit}


def test_real_pictures_that_do_not_belong_are_refused():
    """The shipped weights: goals of nothing, noise, and another camera; pictures that come two steps late."""
    world = model.load()
    with envs.make(envs.EnvConfig("pick-place")) as env, envs.make(envs.EnvConfig("pick-place", cameras=("side",))) as aside:
        played = []
        for seed in range(8300, 8306):
            act = make_policy("expert", env.config, np.random.default_rng(seed))
            played.append(rollout(env, lambda obs, info: act(info), seed))
        other = aside.reset(seed=8300)[1]["goal"]["pixels"]
    usual = Density.fit(torch.cat([world.encode({"pixels": record.obs["pixels"]}).patches for record in played[:4]]))
    highest = max(float(usual(world.encode({"pixels": record.obs["pixels"]}).patches).max()) for record in played[4:])
    gate = SafetyGate(Limits(novelty=1.5 * highest, mismatch=0.03), novelty=usual, sampled=False)
    record = played[0]
    proprio, goal = record.obs["proprio"], record.goal["pixels"]

    def verdict(shown: int, felt: int, wanted):
        past = Past(world, 5)
        past.take_in({"pixels": record.obs["pixels"][shown], "proprio": proprio[felt]}, np.zeros(4, np.float32))
        seen = Seen(past.now, world.encode({"pixels": wanted}), past.pixels, off=past.unlike)
        return gate.judge(Plan(torch.zeros(1, 2, 4), torch.zeros(1), torch.zeros(1, 2, 4)), Features(torch.zeros(1, 2, 64, 128)), seen)

    assert all(verdict(t, t, goal).go for t in range(8))
    noise = np.random.default_rng(0).integers(0, 256, goal.shape, dtype=np.uint8)
    for strange in (np.zeros_like(goal), noise, goal[::-1].copy(), other):
        refused = verdict(0, 0, strange)
        assert not refused.go and "goal's picture is unlike" in refused.why
    late = [verdict(t, t + 2, goal) for t in range(3)]
    assert not any(one.go for one in late) and all("it is old" in one.why for one in late)


def call(*args) -> int:
    return cli.main([str(arg) for arg in args])


def without_hazard(path, folder):
    known = model.load(path)
    known.hazard = None
    known.save(folder / "plain.safetensors")
    return folder / "plain.safetensors"


def test_from_calibrate_to_bench(tmp_path, capsys, caplog):
    for command, extra in (("collect", ()), ("pretrain", ("--data", tmp_path / "collect")),
                           ("train", ("--data", tmp_path / "collect", "--encoder", tmp_path / "pretrain" / "encoder.safetensors"))):  # fmt: skip
        assert call(command, "--preset", "debug", *extra, "--out", tmp_path / command) == 0
    trained = tmp_path / "train" / "model.safetensors"
    assert model.load(trained).hazard is not None
    file = tmp_path / "calibration.safetensors"
    assert call("calibrate", "--preset", "debug", "--model", trained, "--out", file) == 0
    assert "AUROC" in capsys.readouterr().out
    assert call("calibrate", "--preset", "debug", "--model", trained, "--out", file) == 2
    bench = "bench", "--preset", "debug", "--model", trained
    same = "--samples", 8, "--iterations", 3, "--elites", 2, "--max-steps", 3
    assert call(*bench, *same, "--gate", "on", "--calibration", file, "--out", tmp_path / "on") == 0
    assert "refused" in capsys.readouterr().out and "rounds otherwise" not in caplog.text
    tensors, fields, about = load_tensors(file, "calibration")
    fields["of"]["imagined_by"] = "another"
    save_tensors(tmp_path / "elsewhere.safetensors", "calibration", tensors, fields, about)
    assert call(*bench, *same, "--gate", "on", "--calibration", tmp_path / "elsewhere.safetensors", "--out", tmp_path / "there") == 0
    capsys.readouterr()
    assert "tells what another imagined" in caplog.text
    real = *bench, *same, "--realtime", "--gate", "on", "--calibration"
    fields["limits"]["hazard"] = 1e-9
    save_tensors(tmp_path / "never.safetensors", "calibration", tensors, fields, about)
    for name, path, go in (("real", file, 1), ("held", tmp_path / "never.safetensors", 0)):  # a plan is judged a step before it begins
        assert call(*real, path, "--out", tmp_path / name, "--json") == 0
        summary, played = json.loads(capsys.readouterr().out), json.loads((tmp_path / name / "results.json").read_text())["episodes"][0]
        assert len(played["answers"]) == len(played["decision_seconds"]) >= len(played["asked"]) > 1
        assert all(one[1] == go and (one[2] is None) == (not go) for one in played["asked"])  # what would begin later cannot be tried now
        assert summary["refusal_rate"] == 1 - go and (summary["let_go_and_wrong"] is None) == (not go)
    for flag, value in (("--randomization", "light"), ("--object", "cup")):
        assert call(*bench, *same, "--gate", "on", "--calibration", file, flag, value, "--out", tmp_path / value) == 0
        assert f"{value}: its risk does not hold here" in caplog.text
    capsys.readouterr()
    assert call(*bench, *same, "--gate", "random", "--abstain", 1, "--out", tmp_path / "random", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["abstention_rate"] == told["refusal_rate"] == 1.0
    assert call(*bench, *same, "--gate", "on", "--out", tmp_path / "no") == 2
    assert call(*bench, *same, "--gate", "on", "--calibration", trained, "--out", tmp_path / "no") == 2
    assert call(*bench, *same, "--abstain", 0.5, "--out", tmp_path / "no") == 2
    for flag, value in (("--task", "reach"), ("--samples-z", 3), ("--policy", "simulator")):
        assert call(*bench, *same, "--gate", "on", "--calibration", file, flag, value, "--out", tmp_path / "no") == 2
        assert "was calibrated for" in capsys.readouterr().err
    assert call("calibrate", "--preset", "debug", "--model", without_hazard(trained, tmp_path), "--out", tmp_path / "c") == 2
    assert "no hazard head" in capsys.readouterr().err
    assert call("calibrate", "--out", tmp_path / "c", "--risk", 0.01) == 2
    assert "from at least 99 episodes, two thirds of --episodes 90" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
