"""The README's code runs, its commands parse, and the files that it names are there."""

import importlib
import re
import shlex
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs.check import check_goal_env
from planners.agent import Agent, AgentConfig
from worldmodel import data, model
from worldmodel.checkpoint import save_tensors, sha256_of
from worldmodel.commands import cli
from worldmodel.density import load_calibration
from worldmodel.energy import GoalEnergy
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.guide import Guide
from worldmodel.hazard import Hazard
from worldmodel.policy import Policy
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.probe import AttentiveProbe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every shell command, without comments and the virtual environment's folder."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in found if words]


COMMANDS = commands()
LOOP, SEVERAL, GATED, RECORDER, ADAPTED, *PARTS = blocks("python")


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "worldmodel"], ids=" ".join)
def test_commands_parse(words):
    shared, flags = cli.shared_flags(words[2:])
    module = importlib.import_module(f"worldmodel.commands.{words[1]}")
    assert isinstance(cli.parse(words[1], module, flags, shared.preset), module.Config)


def test_every_command_is_shown_and_nothing_else_is_called():
    assert {words[1] for words in COMMANDS if words[0] == "worldmodel"} == set(cli.COMMANDS)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(words[1] in targets for words in COMMANDS if words[0] == "make")
    assert {words[0] for words in COMMANDS} == {"worldmodel", "make"}


def test_named_files_and_targets_exist():
    for name in set(re.findall(r"`([\w/.-]+/|[\w/-]+\.(?:py|txt|toml))`", README)) - {"privileged/"}:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for script in re.findall(r"`python ([\w/.]+)`", README):
        assert (ROOT / script).exists(), script


def tiny(folder: Path) -> Path:
    """A model that has learned nothing, for pictures of the default size."""
    encoder = EncoderConfig(patch_size=24, embed_dim=24, depth=1, num_heads=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = VideoEncoder(encoder), Predictor(PredictorConfig(24, encoder.grid, embed_dim=24, depth=1, num_heads=1))
        policy = Policy(encoder.patches, 24, 7, 4, 8)
    hazard = Hazard(AttentiveProbe(encoder.patches, 24, 8), 7, 4)
    model.LatentModel(*parts, hazard=hazard, guide=Guide(7, 4), policy=policy).save(folder / "model.safetensors")
    return folder / "model.safetensors"


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the README's loop has not exactly one {old}"
    return text.replace(old, new)


@pytest.mark.parametrize("weights", ["tiny", "shipped"])
def test_the_loop_runs(weights, tmp_path):
    """Two steps of it."""
    if weights == "shipped" and not model.shipped().exists():
        pytest.skip("no weights ship yet")
    assert len(LOOP.strip().splitlines()) <= 15
    code = replaced(LOOP, '-v0"),', '-v0", max_steps=2),')
    if weights == "tiny":
        code = replaced(code, "model.load()", f"model.load({str(tiny(tmp_path))!r})")
    names: dict = {}
    try:
        exec(compile(code, "README.md", "exec"), names)
        last = names["agent"].last
        k, horizon = last.imagined.patches.shape[:2]
        assert last.action.shape == (4,) and last.plan.actions.shape == (1, horizon, 4)
        assert last.imagined.proprio.shape == (k, horizon, 7) and last.energies.shape == (k,)
        assert np.isfinite([last.energy, last.spread, last.observed, last.seconds]).all()
        assert last.subgoal == 0 and last.verdict.go
        assert names["truncated"] and not names["info"]["success"]
    finally:
        names["env"].close()


def test_many_environments_plan_at_once(tmp_path):
    """Two environments, whose episodes of two steps begin anew."""
    start = replaced(LOOP, "model.load()", f"model.load({str(tiny(tmp_path))!r})").split("obs, info")[0]
    code = replaced(replaced(SEVERAL, "num_envs=8", "num_envs=2, max_steps=2"), "range(100)", "range(4)")
    names: dict = {}
    try:
        exec(compile(start + code, "README.md", "exec"), names)
        assert not names["begins"].any() and not names["over"].any() and all(agent.last for agent in names["agents"].agents)
    finally:
        names["env"].close()


def test_the_loop_plans_as_the_demo_does(tmp_path):
    from worldmodel.commands import bench, policies

    code = replaced(LOOP, "model.load()", f"model.load({str(tiny(tmp_path))!r})").split("obs, info")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    config = cli.parse("bench", bench, ["--model", str(tiny(tmp_path))], "demo")
    player = policies.Player(bench.resolved(config))
    shown, played = names["agent"], player.agent
    try:
        assert names["env"].unwrapped.config == player.env.config
        assert shown.planner == played.planner
        assert shown.config == played.config
        goal = shown.model.encode({"pixels": np.zeros((96, 96, 3), np.uint8), "proprio": np.ones(7, np.float32)})
        assert shown.energy(goal).config == played.energy(goal).config and not config.goal_proprio
    finally:
        names["env"].close()
        player.close()


def test_the_gate_runs_with_what_a_calibration_holds(tmp_path):
    """What it refuses is answered, which the agent says; limits of other weights are refused."""
    weights, usual = tiny(tmp_path), torch.zeros(16, 24)
    of, limits = {"model_sha256": sha256_of(weights)}, {"hazard": 1e-9, "doubt": None, "surprise": None, "novelty": None}
    save_tensors(tmp_path / "limits.safetensors", "calibration", {"mean": usual, "std": usual + 1}, {"limits": limits, "of": of})
    start, loop = replaced(replaced(LOOP, "model.load()", f"model.load({str(weights)!r})"), '-v0"),', '-v0", max_steps=2),').split("obs, info", 1)
    files = f"Path({str(tmp_path / 'limits.safetensors')!r}), Path({str(weights)!r})"
    gated = replaced(GATED, 'Path("out/calibration.safetensors"), model.shipped()', files)
    names: dict = {}
    exec(compile(start + gated + "obs, info" + loop, "README.md", "exec"), names)
    names["env"].close()
    assert names["agent"].last.answer == "hold" and names["gate"].limits.doubt == np.inf
    save_tensors(tmp_path / "model.safetensors", "model", {"other": usual}, {})
    with pytest.raises(ValueError, match="was calibrated for other weights"):
        load_calibration(tmp_path / "limits.safetensors", weights)


def test_parts_of_ones_own_are_checked_and_reach():
    """Each in 20 lines at most; planner, gate and model reach together, the agent without them."""
    env = gym.make("envs:PandaReach-v0")
    try:
        obs, info = env.reset(seed=3)
        names: dict = {"np": np, "obs": obs}
        for part in PARTS:
            assert sum(bool(line.strip()) for line in part.splitlines()) <= 20
            exec(compile(part, "README.md", "exec"), names)
        own = Agent(names["Straight"](), names["Shooting"](), GoalEnergy, AgentConfig(horizon=1), names["Slow"]())
        for agent in (own, names["Beeline"]()):
            obs, info = env.reset(seed=3)
            agent.reset(info["goal"])
            over = False
            while not over:
                obs, _, terminated, truncated, info = env.step(agent.act(obs))
                over = terminated or truncated
            assert info["success"]
    finally:
        env.close()


def test_an_environment_of_ones_own_is_adapted():
    class Mine(gym.Env):
        """Two joints that are told where to go."""

        action_space = gym.spaces.Box(0.0, 3.0, (2,))

        def reset(self, *, seed=None, options=None):
            self.joints = np.ones(2)
            return self._seen(), {}

        def step(self, action):
            self.joints = self.joints + 0.1 * (action - 1.5)
            return self._seen(), 0.0, False, False, {}

        def _seen(self):
            return {"camera": np.full((96, 96, 3), int(40 * self.joints[0]), np.uint8), "joints": self.joints.astype(np.float32)}

    names: dict = {"mine": Mine(), "photo": np.zeros((96, 96, 3), np.uint8), "joints_there": np.array([1.6, 1.0])}
    exec(compile(ADAPTED, "README.md", "exec"), names)
    check_goal_env(names["env"])
    check_goal_env(names["env"], simulated=False)
    obs, _ = names["env"].reset()
    assert np.allclose(names["env"].step(np.zeros(2))[0]["proprio"], obs["proprio"])
    assert [names["env"].step(np.array([1.0, 0.0]))[-1]["success"] for _ in range(2)] == [False, True]


def test_own_recordings_become_a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    recordings = [
        (rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8), rng.normal(size=(6, 3)).astype("f4"), np.zeros((5, 2), "f4"))
        for _ in range(3)
    ]
    code = replaced(RECORDER, '"data/mine"', repr(str(tmp_path / "mine")))
    exec(compile(code, "README.md", "exec"), {"recordings": recordings})
    frames = data.Dataset.open(tmp_path / "mine").load()
    assert len(frames) == 18 and frames.proprio.shape == (18, 3) and frames.actions.shape == (18, 2)
