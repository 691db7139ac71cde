"""Anyone's environment: what is turned into what, what is refused, and the way from collect to bench."""

import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import envs
from envs.foreign import Foreign, make, policy
from envs.peers import CubeExpert, coarsen
from envs.check import check_goal_env
from worldmodel.commands import cli


class Dot(gym.Env):
    """A dot that actions push about a square; its observation is its place, [4] with two numbers that say nothing."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode="rgb_array", style="uint8", space=None, tells=False):
        self.render_mode, self.style, self.tells = render_mode, style, tells
        self.action_space = space or gym.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.uniform(0.3, 0.7, 2)
        self.steps = 0
        return self._seen(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.at = (self.at + 0.05 * (action - [0, 0.5])).clip(0, 1)
        self.steps += 1
        info = {"is_success": self.steps > 3} if self.tells else {}
        return self._seen(), 1.0, False, False, info

    def _seen(self):
        return np.array([7, *self.at, 7], np.float64)

    def render(self):
        picture = np.zeros((40, 60, 3), np.uint8)
        row, column = (self.at * [30, 30] + [4, 14]).astype(int)
        picture[row : row + 4, column : column + 4] = 255, 128, 0
        if self.style == "float":
            return picture / 255.0
        if self.style == "first":
            return np.moveaxis(picture, 2, 0)
        return {"uint8": picture, "none": None, "grey": picture[..., 0], "wide": 2.0 * picture, "nan": np.nan * picture}[self.style]


CONFIG = Foreign(frame_skip=2, proprio=(1, 2), goal_steps=10, tolerance=0.05, least=0.1)


if "Dot-v0" not in gym.registry:  # worker processes import this module as well
    gym.register("Dot-v0", Dot)


def test_an_environment_becomes_like_ours():
    env = envs.adapt(Dot(), CONFIG, image_size=20, unsafe=lambda obs, info: {"edge": obs[1]} if obs[1] > 0.9 else {})
    check_goal_env(env)
    obs, info = env.reset(seed=3)
    assert obs["pixels"].shape == (20, 20, 3) and obs["pixels"].max() > 200 and obs["proprio"].shape == (2,)
    assert info["distance"] >= 0.1 and not info["success"] and info["subgoals"][0] is info["goal"]
    before = obs["proprio"]
    obs, reward, _, _, info = env.step(np.array([1.0, -1.0]))
    np.testing.assert_allclose(obs["proprio"] - before, [2 * 0.05 * 2, 2 * 0.05 * -0.5], atol=1e-6)  # twice, in their units
    assert reward == 2.0
    for _ in range(5):
        info = env.step(np.array([1.0, 0.0]))[-1]
    assert info["unsafe"] == {"edge": 1.0} and info["cost"] == 1.0


def test_the_goal_can_be_reached_by_the_actions_that_led_there():
    env = envs.adapt(Dot(), CONFIG, image_size=20)
    _, info = env.reset(seed=5)
    for attempt in range(20):
        env.reset(seed=5)
        act = policy("play", env, np.random.default_rng((5, 3, attempt)))
        for _ in range(10):
            *_, told = env.step(act({}))
            if told["success"]:
                return
    raise AssertionError("no attempt reached it")


def test_what_a_user_may_say():
    picture = np.full((40, 40, 3), 9, np.uint8)
    env = envs.adapt(Dot(), image_size=20, goal={"pixels": picture}, success=lambda seen, goal, info: seen["proprio"][1] > 0.8,
                     proprio=lambda obs: obs[:3])  # fmt: skip
    obs, info = env.reset(seed=0)
    assert (info["goal"]["pixels"] == 9).all() and obs["proprio"].shape == (3,) and not info["success"]
    while not info["success"]:
        *_, over, _, info = env.step(np.array([1.0, 0.0]))
    assert over
    with pytest.raises(ValueError, match="the goal has no proprio, by whose distance a tolerance judges"):
        envs.adapt(Dot(), CONFIG, image_size=20, goal={"pixels": picture}).reset(seed=0)
    told = envs.adapt(Dot(tells=True), image_size=20, goal=lambda env, obs, info: {"pixels": picture, "proprio": obs})
    told.reset(seed=0)
    assert [told.step(np.zeros(2))[-1]["success"] for _ in range(5)] == [False] * 3 + [True] * 2


class Cliff(Dot):
    """Ends where the dot comes to the upper half; starts where options say; counts what is watched."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.array((options or {}).get("at", self.at), float)
        return self._seen(), {}

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, bool(self.at[0] > 0.8), False, info


def test_goals_lie_where_an_episode_goes_on_and_begin_where_it_does():
    watched = []
    env = envs.adapt(Cliff(), CONFIG, image_size=20, unsafe=lambda obs, info: watched.append(obs) or {})
    for seed in range(30):
        _, info = env.reset(seed=seed)
        assert info["goal"]["proprio"][0] <= 0.8
    assert not watched  # of the way to a goal, which nobody goes
    obs, info = env.reset(seed=0, options={"at": (0.1, 0.1)})
    assert np.allclose(obs["proprio"], 0.1)
    far = [np.abs(env.reset(seed=seed, options={"at": (-9.0, -9.0)})[1]["goal"]["proprio"]).min() for seed in range(3)]
    assert min(far) == 0.0  # the square's border, where a dot from outside comes first
    with pytest.raises(ValueError, match="fewer where these end episodes"):
        env.reset(seed=0, options={"at": (0.9, 0.5)})


def test_bad_answers_of_users_are_refused():
    def reset_with(goal, **functions):
        env = envs.adapt(Dot(), CONFIG, image_size=20, goal=lambda env, obs, info: goal, **functions)
        env.reset(seed=0)
        env.step(np.zeros(2))

    picture = np.zeros((20, 20, 3), np.uint8)
    for goal, told in ((picture, "the goal is ndarray"), ({"image": picture}, "the goal is keys image"), (None, "the goal is NoneType")):
        with pytest.raises(ValueError, match=told):
            reset_with(goal)
        if goal is not None:
            with pytest.raises(ValueError, match=told):
                envs.adapt(Dot(), CONFIG, image_size=20, goal=goal).reset(seed=0)
    good = {"pixels": picture, "proprio": np.zeros(2)}
    with pytest.raises(ValueError, match="unsafe returned False"):
        reset_with(good, unsafe=lambda obs, info: False)
    for wrong in (lambda obs: 1.0, lambda obs: obs * np.nan):
        with pytest.raises(ValueError, match="proprio of the observation is"):
            reset_with(good, proprio=wrong)
    with pytest.raises(ValueError, match="still is"):
        reset_with(good, still=(5.0, 0.0))
    for proprio in (np.zeros(1), np.zeros(3), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match=r"expected \[2\] finite numbers"):
            reset_with({"pixels": picture, "proprio": proprio})
    with pytest.raises(ValueError, match="empty list"):
        reset_with([])


def test_what_an_observation_holds_is_asked_for_where_it_is_not_clear():
    class Named(Dot):
        def _seen(self):
            return {"joints": super()._seen()[1:3], "wrist": self.render()}

    with pytest.raises(ValueError, match="pictures under wrist: say which, pixels=lambda obs: obs.'wrist'."):
        envs.adapt(Named(), Foreign(tolerance=0.05))
    with pytest.raises(ValueError, match="numbers under joints: say which are the robot's own, proprio=lambda obs: obs.'joints'."):
        envs.adapt(Named(), Foreign(tolerance=0.05), pixels=lambda obs: obs["wrist"])
    env = envs.adapt(Named(), Foreign(tolerance=0.05), image_size=20, pixels=lambda obs: 255 - obs["wrist"], proprio=lambda obs: obs["joints"])
    assert env.reset(seed=0)[0]["pixels"].max() == 255 and env.observation_space["proprio"].shape == (2,)

    class Blind(Dot):
        def _seen(self):
            return self.render()

    with pytest.raises(ValueError, match="no proprio, by which one tells"):
        envs.adapt(Blind(), Foreign(tolerance=0.05))


def test_an_action_of_zero_stays_where_the_user_says():
    told = []

    class OneSided(Dot):
        def step(self, action):
            told.append(np.array(action))
            return super().step(action)

    env = envs.adapt(OneSided(space=gym.spaces.Box(0.0, 3.0, (2,), np.float64)), CONFIG, image_size=20, still=(0.0, 1.0))
    env.reset(seed=0)
    told.clear()
    for action in (0.0, 1.0, -1.0, 0.5, -0.5):
        env.step(np.full(2, action))
    assert np.array(told[::2]).tolist() == [[0, 1], [3, 3], [0, 0], [1.5, 2], [0, 0.5]]


def test_an_environment_that_is_adapted_already_keeps_what_it_says():
    picture = np.full((20, 20, 3), 9, np.uint8)

    def mine(render_mode=None):
        return envs.adapt(Dot(), CONFIG, image_size=40, goal={"pixels": picture, "proprio": np.zeros(2)})

    gym.register("Adapted-v0", mine)
    try:
        env = make(Foreign("Adapted-v0"), 20, 3)
        obs, info = env.reset(seed=0)
        assert (info["goal"]["pixels"] == 9).all() and obs["pixels"].shape == (20, 20, 3) and env.max_steps == 3
        assert env.config.frame_skip == 2
        assert "goal" not in make(Foreign("Adapted-v0"), 20, 3, goals=False).reset(seed=0)[1]
        gym.register("Wrapped-v0", lambda render_mode=None: gym.wrappers.ClipAction(mine()))
        with pytest.raises(ValueError, match="Wrapped-v0 has ClipAction around"):
            make(Foreign("Wrapped-v0"), 20, 3)
        with pytest.raises(ValueError, match="frame_skip means nothing"):
            make(Foreign("Adapted-v0", frame_skip=4), 20, 3)
    finally:
        for name in ("Adapted-v0", "Wrapped-v0"):
            gym.registry.pop(name, None)


def test_whole_numbers_are_rounded_and_an_episode_begins_with_reset():
    told = []

    class Whole(Dot):
        def step(self, action):
            told.append(action)
            return super().step(action)

    env = envs.adapt(Whole(space=gym.spaces.Box(0, 10, (2,), np.int64)), CONFIG, image_size=20)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    env.step(np.array([0.99, -0.99]))
    assert told[-1].tolist() == [10, 0] and told[-1].dtype == np.int64


def test_each_environment_draws_on_its_own_canvas():
    """Others that draw in the same process, or are closed, do not show."""
    pytest.importorskip("imageio", reason="gymnasium's MuJoCo renderer needs the extra peers")
    env = make(Foreign("Reacher-v5", frame_skip=2, proprio=(0, 1, 2, 3), tolerance=0.1, least=0.1), 48, 5)
    alone = env.reset(seed=3)
    other = envs.make(envs.EnvConfig(image_size=48))
    other.reset(seed=3)
    for closes in (False, True):
        if closes:
            other.close()
        seen = env.reset(seed=3)
        for a, b in ((seen[0], alone[0]), (seen[1]["goal"], alone[1]["goal"])):  # some MuJoCo's resets leave the last bits of a motion
            assert (a["pixels"] != b["pixels"]).any(-1).mean() < 0.02
        assert env.render().std() > 3
    env.close()


def test_an_environment_that_is_closed_takes_no_others_pictures_with_it():
    pytest.importorskip("imageio", reason="gymnasium's MuJoCo renderer needs the extra peers")
    for _ in range(3):
        env = make(Foreign("Reacher-v5", frame_skip=2, proprio=(0, 1, 2, 3), tolerance=0.1, least=0.1), 48, 5)
        assert env.reset(seed=3)[0]["pixels"].std() > 3
        env.close()


@pytest.mark.parametrize("where", ["info", "observation"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_goal_that_an_environment_shows_is_the_goal(where, whole):
    picture = np.full((30, 40, 3), 9, np.uint8)

    class Shows(Dot):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            shown = {"goal": {"pixels": picture} if whole else picture}
            return (obs, shown) if where == "info" else ({"state": obs, **shown}, info)

        def step(self, action):
            obs, *others = super().step(action)
            return (obs if where == "info" else {"state": obs, "goal": picture}), *others

    env = envs.adapt(Shows(), Foreign(), image_size=20, pixels=lambda obs: picture + 1, success=lambda obs, goal, info: False)
    for seed in range(2):
        info = env.reset(seed=seed)[1]
        assert info["goal"]["pixels"].shape == (20, 20, 3) and (info["goal"]["pixels"] == 9).all() and len(info["subgoals"]) == 1
    assert (env.step(np.zeros(2))[-1]["goal"]["pixels"] == 9).all()


@pytest.mark.parametrize("style", ["float", "first"])
def test_pictures_are_converted(style):
    plain, other = (envs.adapt(Dot(style=s), CONFIG, image_size=40) for s in ("uint8", style))
    assert np.array_equal(plain.reset(seed=0)[0]["pixels"], other.reset(seed=0)[0]["pixels"])


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: Dot(style="none"), "no pixels.*AddRenderObservation"),
        (lambda: Dot(style="grey"), "no pixels"),
        (lambda: Dot(style="nan"), "uint8 in 0..255 or float in 0..1, got float64 in nan..nan"),
        (lambda: Dot(style="wide"), "uint8 in 0..255 or float in 0..1, got float64"),
        (lambda: Dot(space=gym.spaces.Discrete(3)), "expected a Box"),
        (lambda: Dot(space=gym.spaces.Box(-np.inf, np.inf, (2,))), "has no bounds; say which.*TransformAction"),
    ],
)
def test_what_does_not_fit_is_refused(make_env, message):
    with pytest.raises(ValueError, match=message):
        envs.adapt(make_env(), CONFIG)


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="give a tolerance"):
        envs.adapt(Dot())
    with pytest.raises(ValueError, match="observation of 4 entries"):
        envs.adapt(Dot(), Foreign(proprio=(1, 9), tolerance=0.1))
    with pytest.raises(ValueError, match="2 entries"):
        envs.adapt(Dot(), Foreign(proprio=(1, 2), judged=(2,), tolerance=0.1))
    with pytest.raises(ValueError, match="more goal_steps"):
        envs.adapt(Dot(), Foreign(proprio=(1, 2), tolerance=0.1, least=50.0)).reset(seed=0)
    with pytest.raises(ValueError, match="cannot make 'Nothing-v0'"):
        make(Foreign("Nothing-v0"))
    with pytest.raises(ValueError, match="name=value"):
        make(Foreign("Dot-v0", ("style",)))
    env = envs.adapt(Dot(), CONFIG)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="finite numbers"):
        env.step(np.array([np.nan, 0.0]))


def test_the_check_tells_what_is_missing():
    with pytest.raises(AssertionError, match="expected -1..1; use envs.adapt"):
        check_goal_env(Dot())

    class Broken(gym.Wrapper):
        def __init__(self, change):
            super().__init__(envs.adapt(Dot(), CONFIG, image_size=20))
            self.change = change

        def step(self, action):
            return self.change(*self.env.step(action))

    for change, told in (
        (lambda obs, reward, ends, stops, info: (obs, reward, ends, stops, {}), r"info\['success'\] is None: expected bool"),
        (lambda obs, reward, ends, stops, info: (obs, reward, ends, info), r"step\(...\) returned 4"),
        (lambda obs, *others: (obs | {"pixels": obs["pixels"] / 255}, *others), "pixels of the observation after a step are float64"),
        (lambda obs, *others: (obs | {"proprio": obs["proprio"][:1]}, *others), r"proprio of the observation after a step is \[1\]"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=told):
            check_goal_env(Broken(change))
    bare = gym.Wrapper(envs.adapt(Dot(), CONFIG, image_size=20))
    bare.reset = lambda seed: bare.env.reset(seed=seed)[0]
    with pytest.raises(AssertionError, match=r"reset\(...\) returned dict"):
        check_goal_env(bare)


def test_from_collect_to_bench(tmp_path, capsys):
    env = "--env.id test_adapt:Dot-v0 --env.proprio 1 2 --env.tolerance 0.05 --env.least 0.1".split()
    data, encoder, model = tmp_path / "data", tmp_path / "encoder", tmp_path / "model"

    def call(*words):
        return cli.main([str(word) for word in words])

    assert call("collect", *env, "--image-size", 24, "--episodes", 8, "--max-steps", 6, "--workers", 1, "--out", data) == 0
    small = "--embed-dim 24 --depth 1 --num-heads 1 --batch 4 --steps 4 --threads 1".split()
    assert call("pretrain", "--data", data, *small, "--image-size", 24, "--stride", 1, "--out", encoder) == 0
    assert call("train", "--data", data, "--encoder", encoder / "encoder.safetensors", *small, "--merge", 1, "--transitions", 2, "--out", model) == 0
    bench = "bench", *env, "--episodes", 2, "--max-steps", 3, "--seed", 50, "--samples", 4, "--elites", 2, "--iterations", 1
    assert call(*bench, "--model", model / "model.safetensors", "--video", 1, "--out", tmp_path / "bench") == 0
    assert "Dot-v0" in capsys.readouterr().out and (tmp_path / "bench" / "episode-50.webp").exists()
    limits, few = tmp_path / "limits.safetensors", ("--samples", 4, "--elites", 2, "--iterations", 1, "--max-steps", 3, "--model", model / "model.safetensors")
    assert call("calibrate", *env, *few, "--episodes", 6, "--risk", 0.5, "--alarm", 0.5, "--out", limits) == 0
    assert "0 of" in (told := capsys.readouterr().out) and "none       -" in told  # of what never goes wrong nobody can tell when it does
    assert call(*bench, "--model", model / "model.safetensors", "--gate", "on", "--calibration", limits, "--out", tmp_path / "gated") == 0
    assert "gate      refused" in capsys.readouterr().out
    assert call(*bench, "--policy", "random", "--out", tmp_path / "random") == 0
    assert call(*bench, "--policy", "expert", "--out", tmp_path / "no") == 2
    assert call(*bench, "--out", tmp_path / "no") == 2
    assert "knows nothing of test_adapt:Dot-v0" in capsys.readouterr().err
    assert call(*bench, "--policy", "random", "--env.id", "Gone-v0", "--out", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists()


def photographed(render_mode=None):
    """Nobody knows where the dot of the goal's picture is; a function tells success."""
    goal = {"pixels": np.full((20, 20, 3), 9, np.uint8)}
    return envs.adapt(Dot(), Foreign(proprio=(1, 2)), image_size=20, goal=goal, success=lambda seen, goal, info: seen["pixels"].mean() > 255)


if "Photographed-v0" not in gym.registry:
    gym.register("Photographed-v0", photographed)


def test_a_benchmark_of_a_photographs_success_knows_no_distance(tmp_path, capsys):
    bench = "bench --env.id test_adapt:Photographed-v0 --policy random --episodes 2 --max-steps 3 --out".split()
    assert cli.main([*bench, str(tmp_path / "random")]) == 0
    told = capsys.readouterr().out
    assert "0 of 2" in told and "distance" not in told


@pytest.mark.parametrize(("seen", "told"), [
    (lambda at: {"state": at[None]}, "numbers under state"), (lambda at: {"observation": float(at[0])}, "numbers under observation"),
    (lambda at: (at, at), "a tuple of 2"),
])  # fmt: skip
def test_a_state_of_another_shape_is_asked_about(seen, told):
    class Odd(Dot):
        def _seen(self):
            return seen(np.array(self.at))

    with pytest.raises(ValueError, match=told):
        envs.adapt(Odd(), Foreign(), image_size=20).reset(seed=0)


def test_an_environment_that_takes_no_render_mode_is_made_all_the_same():
    class Seeing(Dot):
        def __init__(self):
            super().__init__()
            self.observation_space = gym.spaces.Dict({"pixels": gym.spaces.Box(0, 255, (40, 60, 3), np.uint8)})

        def _seen(self):
            return {"pixels": self.render()}

    gym.register("Seeing-v0", Seeing)
    try:
        assert make(Foreign("Seeing-v0"), 20, 3, goals=False).reset(seed=0)[0]["pixels"].shape == (20, 20, 3)
    finally:
        gym.registry.pop("Seeing-v0")


def test_what_an_environment_calls_unsafe_itself_is_kept():
    class Telling(Dot):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, info | {"unsafe": {"push": 3.0 - self.steps} if self.steps < 3 else {}, "cost": 9.0}

    env = envs.adapt(Telling(), CONFIG, image_size=20)
    env.reset(seed=0)
    infos = [env.step(np.zeros(2))[-1] for _ in range(2)]  # of two steps each
    assert [info["unsafe"] for info in infos] == [{"push": 2.0}, {}] and [info["cost"] for info in infos] == [1.0, 0.0]
    for told, wanted in (({"collision": False, "speed": 0.0}, {}), (True, {"unsafe": 1.0}), ("no", {})):
        Telling.step = lambda self, action, told=told: (*Dot.step(self, action)[:4], {"unsafe": told})
        env = envs.adapt(Telling(), CONFIG, image_size=20)
        env.reset(seed=0)
        assert env.step(np.zeros(2))[-1]["unsafe"] == wanted
    Telling.step = lambda self, action: (*Dot.step(self, action)[:4], {"unsafe": {"speed": "high"}})
    env = envs.adapt(Telling(), CONFIG, image_size=20)
    with pytest.raises(ValueError, match="info..unsafe.. is {'speed': 'high'}"):
        env.reset(seed=0)
        env.step(np.zeros(2))
    env = envs.adapt(Telling(), CONFIG, image_size=20, unsafe=lambda obs, info: {"broken": np.nan})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="unsafe returned {'broken': nan}"):
        env.step(np.zeros(2))


def test_actions_stay_within_bounds_that_rounding_would_pass():
    high = np.random.default_rng(0).uniform(0.1, 1.0, 200)
    space = gym.spaces.Box(-np.random.default_rng(1).uniform(0.1, 1.0, 200), high, dtype=np.float64)

    class Wide(Dot):
        def step(self, action):
            assert self.action_space.contains(action)
            return self._seen(), 0.0, False, False, {}

    env = envs.adapt(Wide(space=space), CONFIG, image_size=20, goal={"pixels": np.zeros((20, 20, 3), np.uint8), "proprio": np.zeros(2)})
    env.reset(seed=0)
    for sign in (-1.0, 1.0):
        env.step(np.full(200, sign))


def test_episodes_end_where_they_should():
    env = envs.adapt(Dot(tells=True), image_size=20, goal={"pixels": np.zeros((20, 20, 3), np.uint8)}, stop_on_success=False, max_steps=6)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(6)]
    assert ends == [(False, False)] * 5 + [(False, True)]


def test_collect_refuses_who_cannot_act(tmp_path, capsys):
    words = "collect", "--env.id", "test_adapt:Dot-v0", "--policy", "expert", "--out", str(tmp_path / "x")
    assert cli.main(list(words)) == 2 and "not expert" in capsys.readouterr().err and not (tmp_path / "x").exists()


def of_peers(module: str, config: Foreign, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what comes of importing it is not ours to mend
        pytest.importorskip(module, reason="needs the extra peers")
        return make(config, 48, 40, **kwargs)


@pytest.fixture
def fetch():
    env = of_peers("gymnasium_robotics", Foreign(id="FetchPickAndPlace-v4", frame_skip=2, least=0.1))
    yield env
    env.close()


@pytest.fixture
def cube():
    env = of_peers("ogbench", Foreign(id="visual-cube-single-v0", frame_skip=4))
    yield env
    env.close()


def test_an_expert_picks_and_places_in_fetch(fetch):
    check_goal_env(fetch)
    for seed in range(3):
        obs, info = fetch.reset(seed=seed)
        assert np.linalg.norm(info["privileged/object_pos"] - info["privileged/target_pos"]) >= 0.1 and not info["success"]
        act = policy("expert", fetch, np.random.default_rng(seed))
        for _ in range(30):
            obs, _, over, _, info = fetch.step(act(info))
            if over:
                break
        assert info["success"] and np.linalg.norm(info["privileged/object_pos"] - info["privileged/target_pos"]) < 0.05


def test_pictures_of_goals_in_fetch_leave_no_trace(fetch):
    """Two sub-goals, held where the block lies and where it is to be, and an episode that is what it is without them."""
    plays = []
    for goals in (True, False):
        fetch._goals = goals
        obs, info = fetch.reset(seed=4)
        if goals:
            held, end = info["subgoals"]
            np.testing.assert_allclose(held["proprio"][:3], info["privileged/object_pos"], atol=0.01)
            np.testing.assert_allclose(end["proprio"][:3], info["privileged/target_pos"], atol=0.02)
            assert held["proprio"][3] == pytest.approx(0.05) and not np.array_equal(held["pixels"], end["pixels"])
        rng = np.random.default_rng(0)
        plays.append([obs, *(fetch.step(rng.uniform(-1, 1, 4))[0] for _ in range(5))])
    for one, other in zip(*plays):
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_the_gripper_of_fetch_keeps_to_what_it_was_told(fetch):
    fetch.reset(seed=0)
    for told, closed in ((1.0, False), (0.0, False), (-1.0, True), (0.0, True)):
        for _ in range(6):
            obs = fetch.step(np.array([0.0, 0.0, 0.0, told]))[0]
        assert (obs["proprio"][3] < 0.02) == closed


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_an_expert_plays_the_tasks_of_ogbench(cube):
    """Seeds say which task; its goals are held twice and then the benchmark's own, and leave no trace."""
    check_goal_env(cube)
    obs, info = cube.reset(seed=3)
    held, near, goal = info["subgoals"]
    np.testing.assert_allclose(held["proprio"][:2], info["privileged/object_pos"][:2], atol=0.01)
    np.testing.assert_allclose(near["proprio"][:2], info["privileged/target_pos"][:2], atol=0.01)
    assert info["privileged/target_pos"][1] == 0.2 and held["proprio"][-1] < 0.05 < obs["proprio"][-1] and "proprio" not in goal
    again, told = cube.reset(seed=3)
    assert all(np.array_equal(obs[key], again[key]) for key in obs)
    assert all(np.array_equal(one["pixels"], other["pixels"]) for one, other in zip(info["subgoals"], told["subgoals"]))
    act = policy("expert", cube, np.random.default_rng(0))
    for _ in range(40):
        obs, _, over, _, info = cube.step(act(info))
        if over:
            break
    assert info["success"] and np.linalg.norm(info["privileged/object_pos"] - info["privileged/target_pos"]) <= 0.04


def test_the_cubes_expert_comes_down_the_more_the_nearer_it_is():
    """Over the cube: straight down; a centimetre or two aside: across and down, less; low and far aside: up at first."""
    cube = np.array([0.4, 0.0, 0.02])

    def motion(*offset):
        info = {"privileged/object_pos": cube, "privileged/target_pos": cube + [0.1, 0.1, 0.0], "privileged/yaw": 0.0, "privileged/hand_yaw": 0.0}
        return CubeExpert(4, np.random.default_rng(0))(info | {"privileged/hand": cube + offset})

    over, aside, low = motion(0.0, 0.0, 0.1), motion(0.02, 0.0, 0.1), motion(0.1, 0.0, 0.0)
    assert np.abs(over[:2]).max() < 1e-6 and over[2] < aside[2] < 0 and aside[0] < 0
    assert low[0] == 0 and low[2] > 0.5 and over[-1] == aside[-1] == low[-1] == 1


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_a_noisy_expert_finds_back_in_ogbench(cube):
    plain, noisy = (policy(name, cube, np.random.default_rng(2)) for name in ("expert", "noisy"))
    _, info = cube.reset(seed=1)
    strays = 0
    for _ in range(40):
        action = noisy(info)
        strays += not np.array_equal(action, plain(info))
        _, _, over, _, info = cube.step(action)
        if over:
            break
    assert strays and info["success"]


def try_out(env):
    """What is tried leaves no trace, and comes true."""
    env.reset(seed=4)
    rng = np.random.default_rng(0)
    first = env.attempt(rng.uniform(-1, 1, (2, *env.action_space.shape)), ())  # before anything else
    assert len(first) == 2
    for _ in range(3):
        env.step(rng.uniform(-1, 1, env.action_space.shape))
    plans = rng.uniform(-1, 1, (3, 3, *env.action_space.shape))
    plans[:, 0, -1] = -1.0  # the gripper is told anew
    before = env.render()
    tried = [env.attempt(plan, (2,)) for plan in plans]
    assert np.array_equal(env.render(), before) and [set(seen) for seen in tried[0]] == [{"proprio"}] * 2 + [{"pixels", "proprio"}]
    assert np.abs(tried[0][-1]["proprio"] - tried[1][-1]["proprio"]).max() > 0.01
    for h, action in enumerate(plans[1]):
        obs = env.step(action)[0]
        np.testing.assert_allclose(obs["proprio"], tried[1][h]["proprio"], atol=1e-6)
    assert np.abs(obs["pixels"].astype(int) - tried[1][-1]["pixels"]).mean() < 0.5


def test_plans_are_tried_in_fetch(fetch):
    try_out(fetch)


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_plans_are_tried_in_ogbench(cube):
    try_out(cube)


def test_coarser_meshes_look_and_move_the_same():
    """A ball of 20 cm drawn with a fifth of its faces: as large, as round, and falling as before."""
    xml = """<mujoco><asset><mesh name="ball" builtin="sphere" params="4" scale=".1 .1 .1"/></asset><worldbody><light pos="1 0 2"/>
      <geom type="plane" size="1 1 .1"/><camera name="c" pos="0 -1 .4" xyaxes="1 0 0 0 .3 1"/>
      <body pos="0 0 .3"><freejoint/><geom type="mesh" mesh="ball"/></body></worldbody></mujoco>"""
    pictures, places = [], []
    for grain in (0.0, 0.02):
        model = mujoco.MjModel.from_xml_string(xml)
        faces = int(model.mesh_facenum[0])
        if grain:
            coarsen(model, grain)
            assert 20 < model.mesh_facenum[0] < faces / 5
        data = mujoco.MjData(model)
        mujoco.mj_step(model, data, 200)
        with mujoco.Renderer(model, 96, 96) as renderer:
            renderer.update_scene(data, "c")
            pictures.append(renderer.render().astype(float))
        places.append(data.qpos.copy())
    assert np.array_equal(*places) and np.abs(pictures[0] - pictures[1]).mean() < 2 < pictures[0].std()


def test_what_others_decide_is_not_asked_for():
    with pytest.raises(ValueError, match="tolerance means nothing in gymnasium_robotics:FetchPickAndPlace-v4"):
        Foreign(id="gymnasium_robotics:FetchPickAndPlace-v4", tolerance=0.1)
    assert Foreign(id="visual-cube-single-v0").players[0] == "mixture" and Foreign(id="Reacher-v5").players[0] == "play"


@pytest.mark.filterwarnings("ignore:.*precision lowered:UserWarning")
def test_ogbench_collects_from_random_places():
    env = of_peers("ogbench", Foreign(id="visual-cube-single-v0", frame_skip=4), goals=False)
    infos = [env.reset(seed=seed)[1] for seed in range(2)]
    assert "goal" not in infos[0] and not np.allclose(infos[0]["privileged/target_pos"], infos[1]["privileged/target_pos"])
    env.close()
