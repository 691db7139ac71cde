"""The benchmark: its figures, its files, its policies, and the simulator as a model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import envs
from planners.agent import Agent, AgentConfig
from planners.gate import Limits, SafetyGate
from planners.sampling import SamplingConfig, SamplingPlanner
from worldmodel.commands import bench, cli, suite
from worldmodel.commands.actors import Paced, strayed
from worldmodel.commands.bench import Config, resolved, wilson
from worldmodel.commands.policies import Player, goals
from worldmodel.commands.simulator import SimulatorModel
from worldmodel.data import Dataset
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.energy import EnergyConfig, GoalEnergy
from worldmodel.interface import Context
from worldmodel.model import LatentModel
from worldmodel.predictor import Predictor, PredictorConfig

ENCODER = EncoderConfig(image_size=48, patch_size=12, embed_dim=24, depth=1, num_heads=1)
SMALL = {"samples": 6, "iterations": 1, "elites": 2, "max_steps": 3, "episodes": 2}


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoEncoder(ENCODER).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model_file(encoder, tmp_path_factory):
    sizes = PredictorConfig(feature_dim=24, grid=(4, 4), embed_dim=24, depth=1, num_heads=1, latent_dim=2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        predictor = Predictor(sizes)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    LatentModel(encoder, predictor).save(path)
    return path


def timeless(path):
    """results.json without what the clock says."""
    result = json.loads((path / "results.json").read_text())
    del result["summary"]["decision_seconds"], result["summary"]["out"]
    for episode in result["episodes"]:
        assert len(episode.pop("decision_seconds")) == episode["steps"]
    return result


def test_wilson():
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


@pytest.mark.parametrize("task", ["reach", "grasp", "reach-with-object", "pick-place"])
def test_the_expert_succeeds_and_nothing_does_not(task, tmp_path):
    good = bench.run(Config(tmp_path / "good", task=task, object="cup", policy="expert", episodes=2))
    idle = bench.run(Config(tmp_path / "idle", task=task, object="cup", policy="nothing", episodes=2, max_steps=4))
    assert (good["success_rate"], idle["success_rate"]) == (1.0, 0.0)
    assert idle["final_distance"] == pytest.approx(idle["initial_distance"], abs=2e-3) or task == "grasp"
    assert idle["initial_distance"] > (0.07 if task == "grasp" else 0.1)
    if task != "grasp":
        assert good["final_distance"] < 0.03


def test_results_hold_config_episodes_and_summary(tmp_path):
    summary = bench.run(Config(tmp_path / "out", policy="expert", episodes=3, seed=7))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["summary"] == summary and result["config"]["policy"] == "expert" and result["config"]["seed"] == 7
    assert [episode["seed"] for episode in result["episodes"]] == [7, 8, 9]
    episode = result["episodes"][0]
    assert episode["success"] and episode["task"] == "pick-place" and episode["object"] == "box"
    assert episode["initial_distance"] > 0.1 > 0.03 >= episode["final_distance"] and isinstance(episode["unsafe"], list)
    assert summary["success_rate"] == 1 and summary["success_ci95"] == pytest.approx(wilson(3, 3))
    assert set(summary["decision_seconds"]) == {"median", "p95"} and 0 <= summary["unsafe_rate"] <= 1
    assert "100.0%  [43.9%, 100.0%]  3 of 3" in bench.report(summary)
    assert sorted(os.listdir(tmp_path / "out")) == ["episodes.jsonl", "results.json"]


def test_unsafe_events_are_counted(tmp_path):
    summary = bench.run(Config(tmp_path, policy="random", episodes=6, seed=3))
    episodes = json.loads((tmp_path / "results.json").read_text())["episodes"]
    unsafe = [episode["unsafe"] for episode in episodes]
    assert summary["unsafe_rate"] == pytest.approx(np.mean([bool(events) for events in unsafe]))
    assert sum(summary["unsafe_events"].values()) == sum(map(len, unsafe))


@pytest.mark.parametrize("policy", ["planner", "simulator"])
def test_the_same_seeds_give_the_same_numbers_however_many_workers(policy, model_file, tmp_path):
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        bench.run(Config(tmp_path / name, policy=policy, model=model_file, workers=workers, **SMALL))
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b") == timeless(tmp_path / "c")
    assert all(len(e["energy"]) == 3 and min(e["energy"]) > 0 for e in timeless(tmp_path / "a")["episodes"])


def test_a_killed_run_goes_on(tmp_path):
    config = {"policy": "random", "episodes": 4, "max_steps": 3}
    bench.run(Config(tmp_path / "whole", **config))
    bench.run(Config(tmp_path / "part", **config))
    lines = (tmp_path / "part" / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part" / "episodes.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])  # torn in the fourth line
    (tmp_path / "part" / "results.json").unlink()
    kept = json.loads(lines[1])
    bench.run(Config(tmp_path / "part", **config))
    assert timeless(tmp_path / "part") == timeless(tmp_path / "whole")
    again = json.loads((tmp_path / "part" / "results.json").read_text())["episodes"]
    assert again[0]["decision_seconds"] == kept["decision_seconds"]  # kept, not played anew


def test_a_folder_of_something_else_is_refused(tmp_path):
    config = {"policy": "nothing", "episodes": 1, "max_steps": 1}
    bench.run(Config(tmp_path / "a", **config))
    with pytest.raises(FileExistsError, match="holds another run, with seed 10000 instead of 5; choose another"):
        bench.run(Config(tmp_path / "a", **config, seed=5))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds notes.txt"):
        bench.run(Config(tmp_path / "b", **config))
    with pytest.raises(NotADirectoryError, match="is a file"):
        bench.run(Config(tmp_path / "b" / "notes.txt", **config))
    (tmp_path / "a" / "episodes.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is damaged"):
        bench.run(Config(tmp_path / "a", **config))


@pytest.mark.parametrize("fields", [{"episodes": 0}, {"episodes": -3}, {"workers": 0}, {"samples": 0}, {"seed": -1}, {"video": -1}])
def test_bad_numbers_are_refused(fields, tmp_path):
    with pytest.raises(ValueError, match="expected at least"):
        Config(tmp_path / "out", **fields)


def test_what_is_wrong_is_noticed_before_anything_is_written(model_file, tmp_path):
    for fields, error, words in (
        ({"model": tmp_path / "none.safetensors"}, FileNotFoundError, "none.safetensors"),
        ({"model": model_file, "samples": 4, "elites": 5}, ValueError, "elites is 5 of 4"),
        ({"model": model_file, "horizon": 2, "replan": 3}, ValueError, "replan is 3"),
        ({"model": model_file, "cameras": ("front", "side")}, ValueError, "1 cameras, got front, side"),
        ({"policy": "expert", "cameras": ("above",)}, ValueError, "cameras"),
    ):
        with pytest.raises(error, match=words):
            bench.run(Config(tmp_path / "out", **fields))
        assert not (tmp_path / "out").exists()


def test_on_the_command_line(model_file, tmp_path, capfd):
    args = ["bench", "--policy", "planner", "--model", str(model_file), "--preset", "debug", "--out", str(tmp_path / "out")]
    assert cli.main([*args, "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["episodes"] == 1 and summary["goals"] == "final, pictures alone"
    assert cli.main([*args, "--goal-proprio"]) == 2
    assert "holds another run" in capfd.readouterr().err
    assert cli.main(["bench", "--episodes", "0", "--out", str(tmp_path / "no")]) == 2
    assert "episodes is 0, expected at least 1" in capfd.readouterr().err


def test_goals_are_pictures_alone_unless_asked(tmp_path):
    obs = {"pixels": np.zeros((2, 2, 3)), "proprio": np.zeros(7)}
    info = {"goal": obs, "subgoals": [obs, obs]}
    assert [set(goal) for goal in goals(Config(tmp_path, goal="subgoals"))(info)] == [{"pixels"}] * 2
    both = goals(Config(tmp_path, goal_proprio=True))(info)
    assert [set(goal) for goal in both] == [{"pixels", "proprio"}]


def test_a_video_moves_and_shows_the_energy(model_file, tmp_path):
    bench.run(Config(tmp_path / "plan", policy="planner", model=model_file, video=1, **SMALL))
    bench.run(Config(tmp_path / "idle", policy="nothing", video=5, episodes=1, max_steps=3))
    with Image.open(tmp_path / "plan" / "episode-10000.webp") as film, Image.open(tmp_path / "idle" / "episode-10000.webp") as idle:
        assert film.n_frames == 4 and idle.n_frames in (1, 4)  # identical pictures become one
        assert film.size[1] == idle.size[1] and film.size[0] > idle.size[0] > idle.size[1]
    assert not (tmp_path / "plan" / "episode-10001.webp").exists()


def test_what_was_played_is_data_to_train_on(model_file, tmp_path):
    for workers in (1, 2):
        bench.run(Config(tmp_path / str(workers), policy="planner", model=model_file, record=True, workers=workers, **SMALL))
    sets = [Dataset.open([tmp_path / str(workers) / "data"]) for workers in (1, 2)]
    assert sets[0].recipes[0]["checksums"] == sets[1].recipes[0]["checksums"]
    frames = sets[0].load(keys=("pixels", "proprio", "actions", "privileged/unsafe"))
    assert frames.pixels.shape == (8, 48, 48, 3) and list(frames.offsets) == [0, 4, 8]
    assert np.abs(frames.actions[:3]).max() > 0
    lost = tmp_path / "1" / "data" / "episode-000001.npz"
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"mend it with: worldmodel bench .*--record .*--out {tmp_path / '1'}$"):
        Dataset.open([tmp_path / "1" / "data"])
    bench.run(Config(tmp_path / "1", policy="planner", model=model_file, record=True, **SMALL))
    assert Dataset.open([tmp_path / "1" / "data"]).recipes[0]["checksums"] == sets[1].recipes[0]["checksums"]
    with pytest.raises(ValueError, match="--record"):
        Config(tmp_path, record=True, trajectory=tmp_path / "some.npz")
    with pytest.raises(ValueError, match="no --horizon: each step is planned one step ahead"):
        Config(tmp_path, horizon=3, trajectory=tmp_path / "some.npz")


# The simulator as a model


@pytest.fixture
def world(encoder):
    env = envs.make(envs.EnvConfig(image_size=48, max_steps=100))
    env.reset(seed=5)
    model = SimulatorModel(encoder, env)
    yield env, model
    model.close()
    env.close()


def test_the_simulator_imagines_what_happens(world, encoder):
    env, model = world
    for _ in range(3):
        env.step(np.array([0.2, 0.1, -0.8, -0.2]))
    before = env.get_state().physics.copy()
    actions = 2 * torch.rand(1, 4, 3, 4, generator=torch.Generator().manual_seed(0)) - 1
    context = Context(model.encode(env.observe()), torch.zeros(1, 0, 4))
    imagined = model.rollout(context, actions, model.sample_z((1, 4, 2, 3), None))
    assert imagined.patches.shape == (1, 4, 2, 3, 16, 24) and imagined.proprio.shape == (1, 4, 2, 3, 7)
    assert np.array_equal(env.get_state().physics, before)  # untouched
    state = env.get_state()
    for n in (2, 0):
        env.set_state(state)
        for h in range(3):
            obs = env.step(actions[0, n, h].numpy())[0]
            seen = model.encode(obs)
            torch.testing.assert_close(imagined.patches[0, n, 1, h], seen.patches, atol=0.1, rtol=0)  # bfloat16, other batch
            assert torch.equal(imagined.proprio[0, n, 0, h], seen.proprio)


def test_the_simulator_draws_the_last_frame_alone_where_that_is_enough(world, encoder):
    env, model = world
    last = SimulatorModel(encoder, env, "last")
    actions, z = torch.ones(1, 2, 3, 4) / 2, torch.zeros(1, 2, 1, 3, 1)
    some, all_ = last.rollout(None, actions, z), model.rollout(None, actions, z)
    assert some.patches[:, :, :, :2].isnan().all() and torch.equal(some.proprio, all_.proprio)
    torch.testing.assert_close(some.patches[:, :, :, 2], all_.patches[:, :, :, 2], atol=0.1, rtol=0)
    last.close()


def test_the_simulator_has_one_environment(world):
    with pytest.raises(ValueError, match=r"expected actions \[1, N, H, 4\]"):
        world[1].rollout(None, torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 1, 1))


def test_in_the_simulator_a_gate_sees_each_step_and_the_hazard_the_step_before():
    """Whatever the cost looks at."""
    player = Player(resolved(Config(Path("out"), policy="simulator", risk_weight=0.0, samples=2, iterations=1, max_steps=2)))
    contexts, head = [], player.agent.hazard
    player.agent.gate = SafetyGate(Limits(hazard=1.0), lambda context, *rest: contexts.append(context) or head(context, *rest), sampled=False)
    steps = []
    player.play(100, steps)
    player.close()
    assert [step["answer"] for step in steps] == ["plan", "plan"], [step["verdict"].why for step in steps]
    assert contexts[-1].actions.shape == (1, 1, 4)


def test_planning_in_the_simulator_finds_lower_energies(encoder):
    """Even those of an untrained encoder, which tell little about distances."""
    env = envs.make(envs.EnvConfig(task="reach", image_size=48))
    obs, info = env.reset(seed=1)
    model = SimulatorModel(encoder, env, "last")
    planner = SamplingPlanner(SamplingConfig("icem", samples=24, iterations=2, elites=5, std=1.0))
    agent = Agent(model, planner, lambda goal: GoalEnergy(goal, EnergyConfig("l2", "last")), AgentConfig(3, True, looks=1))
    agent.reset(info["goal"])
    energies = []
    for _ in range(6):
        obs = env.step(agent.act(obs))[0]
        energies.append(agent.last.observed)
    model.close()
    env.close()
    assert energies[-1] < 0.7 * energies[0]


def test_a_player_plays_an_encoder_file_in_the_simulator(encoder, tmp_path):
    from worldmodel.pretrain import save_encoder

    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    config = bench.resolved(Config(tmp_path / "out", policy="simulator", goal="subgoals", model=tmp_path / "encoder.safetensors", **SMALL))
    player = Player(config)
    episode, film, _ = player.play(3)
    player.close()
    assert episode["steps"] == 3 and film.frames.shape == (4, 48, 48, 3) and len(film.goals) == 3


class Slow:
    """An agent whose n-th decision is the action [n], [n + 0.5] after it, and takes as long as `seconds` says."""

    def __init__(self, seconds):
        self.fallback, self.seconds, self.heard = np.array([-1.0]), list(seconds), []

    def act(self, obs, ran, under_way):
        n = len([kind for kind, *_ in self.heard if kind == "act"]) + 1
        self.heard.append(("act", obs, None if ran is None else ran[0], under_way[0][0]))
        self.last = SimpleNamespace(seconds=self.seconds.pop(0), later=[np.array([n + 0.5])])
        return np.array([float(n)])

    def watch(self, obs, ran):
        self.heard.append(("watch", obs, ran[0]))


def test_a_world_that_does_not_wait_runs_the_last_plan_while_a_decision_is_late():
    agent = Slow([0.1, 0.1, 0.25, 0.55, 0.1, 0.1])
    paced = Paced(agent, 0.2)
    told, decided = [], []
    for t in range(9):
        told.append((float(paced(t)[0]), paced.late))
        decided.append(paced.decides)
    #        none yet       first         second        late: its rest   third         not due yet: its rest, then late
    assert told == [(-1.0, False), (1.0, False), (2.0, False), (2.5, True), (3.0, False), (3.5, False), (-1.0, True), (4.0, False), (4.5, False)]
    assert decided == [kind == "act" for kind, *_ in agent.heard] == [True, True, True, False, True, False, False, True, False]
    assert agent.heard[:4] == [("act", 0, None, -1.0), ("act", 1, -1.0, 1.0), ("act", 2, 1.0, 2.0), ("watch", 3, 2.0)]
    assert paced(9) == 5.0  # made at once, but planned to begin two steps after the one before it, as far as that one's plan reaches


def test_a_benchmark_in_real_time_counts_what_came_late(model_file, tmp_path):
    with pytest.raises(ValueError, match="leave it at 1"):
        Config(tmp_path / "run", realtime=True, replan=2)
    with pytest.raises(ValueError, match="takes no gate that refuses by chance"):
        Config(tmp_path / "run", realtime=True, gate="random", abstain=0.5)
    config = Config(tmp_path / "run", model=model_file, realtime=True, episodes=1, max_steps=4, samples=4, iterations=1, elites=2)
    summary = bench.run(config)
    assert 0 <= summary["late_rate"] <= 0.75 and 0 < summary["decided_rate"] <= 1 and "began while" in bench.report(summary)
    episode = json.loads((tmp_path / "run" / "results.json").read_text())["episodes"][0]
    assert episode["late"] + len(episode["decision_seconds"]) <= episode["steps"] == 4  # a step may be neither: one is under way, and not due
    assert summary["decided_rate"] == len(episode["decision_seconds"]) / 4 and summary["late_rate"] == episode["late"] / 4


def test_a_device_that_is_not_there_is_named(model_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="this torch finds no GPU"):
        bench.run(Config(tmp_path / "out", model=model_file, device="cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_decides_the_same(model_file, tmp_path):
    """The same candidates are drawn, so that the first decisions agree; later ones may part by rounding."""
    runs = [bench.run(Config(tmp_path / name, model=model_file, device=name, **SMALL)) for name in ("cpu", "cuda")]
    assert runs[0]["episodes"] == runs[1]["episodes"]
    first = [json.loads((tmp_path / name / "results.json").read_text())["episodes"][0]["energy"][0] for name in ("cpu", "cuda")]
    assert first[0] == pytest.approx(first[1], rel=0.02)


def test_a_policy_strays_as_often_as_it_is_told_within_what_may_be_done():
    rng, action = np.random.default_rng(0), np.array([1.0, -0.5, 0.2, -1.0], np.float32)
    others = np.array([strayed(action, rng) for _ in range(300)])
    up = (others == [0, 0, 0.5, 0]).all(1)
    assert 0.1 < up.mean() < 0.3 and np.abs(others).max() <= 1 and (others[~up, -1] == -1).all()
    shorter = np.abs(others[~up, :3]).max(1) < 0.99
    assert 0.5 < shorter.mean() and (action == [1.0, -0.5, np.float32(0.2), -1.0]).all()
    with pytest.raises(ValueError, match="--policy imitation"):
        Config(Path("out"), stray=0.3)
    with pytest.raises(ValueError, match="0 to 1"):
        Config(Path("out"), policy="imitation", stray=1.5)


def test_a_suite_is_rows_of_benchmarks_in_one_table(tmp_path, capfd, monkeypatch):
    (tmp_path / "own.yaml").write_text("rows: [--task reach --policy nothing --episodes 2 --max-steps 2, --task reach --policy expert --episodes 1]")
    (tmp_path / "torn.yaml").write_text("rows: nothing")
    (tmp_path / "wrong.yaml").write_text("rows: [--task reach --policy magic]")
    (tmp_path / "odd.yaml").write_text("rows: [--task reach --seed=7]")
    monkeypatch.setattr(suite, "SUITES", tmp_path)
    out = str(tmp_path / "out")
    assert cli.main(["bench", "--suite", "own", "--seed", "100", "--out", out, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [row["success_rate"] for row in told["rows"].values()] == [0.0, 1.0]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") == 4 and "| `--task reach --policy expert --episodes 1` | 1 | 100.0% | 21% to 100% | 0.0% |" in table
    assert cli.main(["bench", "--suite", "own", "--seed", "100", "--out", out]) == 0  # which plays nothing again
    assert "table.md" in capfd.readouterr().out
    for flags, expected in {
        "--suite none": "known are odd, own, torn, wrong", "--suite torn": "has no rows", "--suite wrong": "'planner', 'simulator'",
        "--suite own --episodes 3": "leave --episodes", "--suite odd": "has --seed: expected episodes to play",
    }.items():  # fmt: skip
        assert cli.main(["bench", *flags.split(), "--out", str(tmp_path / "other")]) == 2
        assert expected in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [path.stem for path in suite.SUITES.glob("*.yaml")])
def test_rows_of_the_suites_are_benchmarks(name):
    for row in suite.rows_of(name):
        assert isinstance(suite.parsed(row, Path("out"), bench), bench.Config)
