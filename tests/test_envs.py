"""The environments: the contract, the physics behind it, and what is refused."""

import os
import subprocess
import sys

import gymnasium as gym
import mink
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs.check import check
from envs.control import DOWN as DIRECTION
from envs.control import MOVE, ControlState
from envs.run import rollout
from envs.scene import CAMERAS, HOME
from envs.tasks import Pose

pytestmark = pytest.mark.filterwarnings("error")
IDLE = np.zeros(4)
UP, DOWN, CLOSE, OPEN = (np.array(a, float) for a in ([0, 0, 1, 0], [0, 0, -1, 0], [0, 0, 0, -1], [0, 0, 0, 1]))


@pytest.fixture
def env():
    env = envs.make(envs.EnvConfig(render_goals=False))
    env.reset(seed=0)
    yield env
    env.close()


def on_table(env: envs.PandaEnv, tcp, object_pos=(0.5, 0.0), opening=0.08) -> Pose:
    return Pose(np.array(tcp, float), opening, opening, np.array([*object_pos, env.scene.spec.half_height]), 0.0)


@pytest.mark.parametrize("name", ["PandaReach-v0", "PandaGrasp-v0", "PandaReachWithObject-v0", "PandaPickPlace-v0", "PandaPickPlaceFragile-v0"])
def test_gymnasium_finds_nothing_to_say(name):
    env = gym.make(f"envs:{name}", object="cup", render_mode="rgb_array").unwrapped
    check_env(env)
    env.close()


@pytest.mark.parametrize("task", envs.TASKS)
@pytest.mark.parametrize("object", ["box", "cup", "can"])
def test_contract(task, object):
    check(envs.EnvConfig(task=task, object=object))


def test_contract_holds_for_the_options():
    config = envs.EnvConfig(randomization="strong", action_dim=7, cameras=("front", "side"), image_size=48)
    check(config)
    env = envs.make(config)
    assert env.reset(seed=0)[0]["pixels"].shape == (48, 96, 3)
    env.close()


def test_randomisation_leaves_no_residue():
    plain, used = (envs.make(envs.EnvConfig(object="cup")) for _ in range(2))
    first, _ = used.reset(seed=4)
    used.randomizer.apply(used.randomizer.draw("strong", np.zeros((1, 3)), np.random.default_rng(0)))
    assert not np.array_equal(used.scene.render(), first["pixels"])
    a, b = plain.reset(seed=4)[0], used.reset(seed=4)[0]
    assert np.array_equal(a["pixels"], b["pixels"]) and np.array_equal(a["proprio"], b["proprio"])
    plain.close()
    used.close()


def test_the_hand_arrives(env):
    env.put(on_table(env, (0.5, 0, 0.15), object_pos=(0.3, 0.3)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        env.step(rng.choice([-1.0, 1.0], 4))
        assert np.abs(env.scene.tcp_pos - env.controller.state.pos).max() < 0.005


def test_seven_dimensions_turn_the_hand():
    env = envs.make(envs.EnvConfig(action_dim=7, render_goals=False))
    env.reset(seed=0)
    env.put(on_table(env, (0.5, 0, 0.2)))
    for axis in range(3):
        before = env.get_state()
        seen = env.step(np.eye(7)[3 + axis])[0]["proprio"][3:6]
        assert np.allclose(seen, 0.25 * np.eye(3)[axis], atol=0.02)
        env.set_state(before)
    env.close()


@pytest.mark.parametrize("object", ["box", "cup", "can"])
def test_objects_rest_still(object):
    env = envs.make(envs.EnvConfig(object=object, render_goals=False))
    env.reset(seed=1)
    before = env.scene.object_pos
    for _ in range(20):
        env.step(IDLE)
    assert np.abs(env.scene.object_pos - before).max() < 2e-4 and env.scene.object_speed < 1e-3
    env.close()


@pytest.mark.parametrize("object", ["box", "cup", "can"])
def test_the_grip_holds_through_the_hardest_motion(object):
    env = envs.make(envs.EnvConfig(task="reach-with-object", object=object, render_goals=False, stop_on_success=False))
    env.reset(seed=2)
    for _ in range(4):
        env.step(UP)
    before = env.scene.object_pos - env.scene.tcp_pos
    rng = np.random.default_rng(0)
    for _ in range(20):
        info = env.step(np.append(rng.choice([-1.0, 1.0], 2), [0, 0]))[-1]
        assert info["privileged/grasped"] and not info["unsafe"]
    assert np.linalg.norm(env.scene.object_pos - env.scene.tcp_pos - before) < 0.025
    env.close()


def test_pressing_is_unsafe_and_does_not_sink(env):
    env.put(on_table(env, (0.5, 0, 0.08), opening=0.0))
    env.controller.settle(env.controller.state.pos, env.controller.state.joints, 0.0)
    unsafe = {}
    for _ in range(2):
        unsafe |= env.step(DOWN)[-1]["unsafe"]
        assert env.scene.object_pos[2] > env.scene.spec.half_height - 0.003
    assert unsafe["object_force"] > 100 and unsafe["table_force"] > 60


def test_a_drop_is_unsafe(env):
    env.put(on_table(env, (0.5, 0, 0.0225)))
    for action in (CLOSE, UP, UP, UP):
        info = env.step(action)[-1]
    assert info["privileged/grasped"] and not info["unsafe"]
    seen = {}
    for action in (OPEN, IDLE, IDLE):
        info = env.step(action)[-1]
        seen |= info["unsafe"]
        assert info["cost"] == len(info["unsafe"])
    assert set(seen) == {"dropped"} and 0.1 < seen["dropped"] < 0.16


def test_touching_a_fragile_post_is_unsafe_and_posts_go_with_the_state():
    env = envs.make(envs.EnvConfig("pick-place-fragile", image_size=48))
    first, _ = env.reset(seed=0)
    before, spot = env.get_state(), env.episode.posts[0]
    env.put(on_table(env, [*spot, 0.12], env.episode.start.object_pos[:2], opening=0.0))
    unsafe = {}
    for _ in range(3):
        unsafe |= env.step(DOWN)[-1]["unsafe"]
    assert unsafe["post_force"] > 5
    env.reset(seed=1)
    env.set_state(before)
    assert np.array_equal(env.observe()["pixels"], first["pixels"])
    env.close()


def test_what_is_parked_does_not_move_the_planes_of_depth(env):
    """Data made before there were posts is made again to the bit."""
    assert env.scene.model.stat.extent == pytest.approx(3.1614691909, abs=1e-9)


def test_leaving_the_table_is_unsafe(env):
    env.put(on_table(env, (0.5, 0, 0.2), object_pos=(0.5, 0.6)))
    unsafe = {}
    for _ in range(3):
        unsafe |= env.step(IDLE)[-1]["unsafe"]
    assert unsafe["off_table"] < -0.05


def test_self_collision_is_unsafe(env):
    folded, scene = HOME.copy(), env.scene
    folded[[3, 5]] = -3.0, 0.0
    scene.place(folded, 0.08, np.array([0.3, 0.3, 0.0225]), np.array([1.0, 0, 0, 0]))
    env.controller.state = ControlState(folded, scene.tcp_pos, scene.tcp_mat, 0.08)
    assert env.step(IDLE)[-1]["unsafe"]["self_collision"] > 0


def test_a_joint_at_its_limit_is_unsafe_and_stays_within():
    env = envs.make(envs.EnvConfig(action_dim=7, render_goals=False))
    env.reset(seed=0)
    env.put(on_table(env, (0.5, 0, 0.2)))
    for _ in range(26):
        info = env.step(np.eye(7)[5])[-1]
    assert abs(info["unsafe"]["joint_limit"]) < 0.01
    env.close()


def test_blocked_hand_keeps_its_target_near(env):
    for _ in range(6):
        env.step(np.array([1.0, 1, 1, 0]))
    ahead = env.controller.state.pos - env.scene.tcp_pos
    assert np.abs(ahead).max() < MOVE / 2
    env.step(-np.ones(4))
    assert np.abs(env.controller.state.pos - env.scene.tcp_pos).max() < 0.005


@pytest.mark.parametrize(
    ("field", "value", "known"),
    [("task", "fly", "pick-place"), ("object", "cat", "box"), ("randomization", "wild", "strong"), ("cameras", ("top",), "front"),
     ("action_dim", 5, "4 or 7"), ("image_size", 0, "16"), ("max_steps", 0, "at least 1"), ("randomization", "moved-post", "has no posts")],
)  # fmt: skip
def test_bad_config_is_named(field, value, known):
    with pytest.raises(ValueError, match=known):
        envs.EnvConfig(**{field: value})


def test_an_occluder_needs_the_camera_that_it_is_before():
    with pytest.raises(ValueError, match="the front camera; got side"):
        envs.EnvConfig(randomization="occluder", cameras=("side",))


def test_what_is_under_the_palm_is_not_let_go():
    env = envs.make(envs.EnvConfig(object="cup", render_goals=False))
    env.reset(seed=0)
    target = env.episode.wanted.target
    env.put(Pose(target + [0.0, 0.075, 0.06], 0.0, 0.0, target, 0.0))
    assert env.step(np.array([0.0, 0.0, -1.0, -1.0]))[-1]["success"]
    pressed = env.step(np.array([0.0, 0.0, -1.0, -1.0]))[-1]
    assert pressed["unsafe"]["object_force"] > 100 and not pressed["success"] and not pressed["privileged/touched"]  # by no finger
    env.close()


def test_bad_actions_are_named(env):
    with pytest.raises(ValueError, match=r"\(7,\).*\(4,\)"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array([0, np.nan, 0, 0]))
    with pytest.raises(ValueError, match="reset"):
        envs.make(envs.EnvConfig()).step(IDLE)
    with pytest.raises(TypeError):
        gym.make("envs:PandaReach-v0", objct="box")


def run(code: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environ})


def test_imports_stay_light():
    done = run("import envs, envs.check, envs.experts, envs.run, sys; assert not {'torch', 'worldmodel'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_no_gl_is_told_in_a_line_that_names_the_remedy():
    code = """
import envs
env = envs.make(envs.EnvConfig())
try:
    env.reset(seed=0)
except RuntimeError as error:
    assert "\\n" not in str(error) and "libegl1" in str(error) and "MUJOCO_GL" in str(error)
else:
    raise SystemExit("drew without GL")
"""
    done = run(code, MUJOCO_GL="disable")
    assert done.returncode == 0, done.stderr


def test_the_programs_are_those_of_mink():
    """To the bit: H, f, G and the upper bounds, near and far from the target and at a joint's limit."""
    env = envs.make(envs.EnvConfig())
    ik, rng = env.controller._ik, np.random.default_rng(0)
    low, high = ik.arm.model.jnt_range.T
    for share in (0.05, 0.5, 1.0):
        for dt in (0.1, 1.0):
            ik.arm.update(HOME + share * (rng.uniform(low, high) - HOME))
            ik.hand.set_target(mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(DIRECTION), rng.uniform(0, 1, 3)))
            qp = mink.build_ik(ik.arm, [ik.hand, ik.posture], dt, damping=ik.DAMPING, limits=ik.limits)
            for ours, theirs in zip(ik.program(dt), (qp.P, qp.q, qp.G, qp.h), strict=True):
                assert np.array_equal(ours, theirs)
    env.close()


@pytest.mark.parametrize("object", ["box", "cup", "can"])
def test_goals_are_the_same_without_pictures(object):
    drawn, plain = (envs.make(envs.EnvConfig(object=object, render_goals=r, image_size=16)) for r in (True, False))
    for seed in range(4):
        one, other = (env.reset(seed=seed)[1]["subgoals"] for env in (drawn, plain))
        assert all(np.array_equal(a["proprio"], b["proprio"]) for a, b in zip(one, other, strict=True))
    drawn.close()
    plain.close()


def test_pictures_drawn_afterwards_are_the_same():
    drawn, later = (
        envs.make(envs.EnvConfig(cameras=("front", "wrist"), randomization="strong", render_goals=r, render_observations=r))
        for r in (True, False)
    )
    assert later.observation_space.contains(later.reset(seed=3)[0])
    first, second = (rollout(env, lambda obs, info: CLOSE + DOWN, seed=3, max_steps=6) for env in (drawn, later))
    state = later.get_state().physics
    assert np.array_equal(later.scene.film(second.obs["qpos"]), first.obs["pixels"])
    assert np.array_equal(later.get_state().physics, state)
    assert np.array_equal(first.obs["proprio"], second.obs["proprio"]) and "pixels" not in second.obs
    drawn.close()
    later.close()


@pytest.mark.parametrize("object", ["box", "cup", "can"])
def test_pixels_of_the_object_are_counted_as_drawn(object):
    env = envs.make(envs.EnvConfig(object=object, cameras=("front", "side")))
    scene, rng, counts = env.scene, np.random.default_rng(0), []
    things = [i for i in range(scene.model.ngeom) if scene.model.geom(i).name.startswith("object")]
    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(6):
            env.step(np.append(rng.uniform(-1, 1, 3) + [0, 0, -0.6], 1.0))
            state, before = scene.get_state(), scene.render()
            counted = int(scene.object_pixels(scene.data.qpos[None].copy())[0])
            assert np.array_equal(scene.get_state(), state)
            scene.model.geom_rgba[things, :3] = 1 - scene.model.geom_rgba[things, :3]  # what changes colour is the object
            drawn = int((scene.render() != before).any(-1).sum())
            scene.model.geom_rgba[things, :3] = 1 - scene.model.geom_rgba[things, :3]
            assert abs(counted - drawn) <= 6
            robot, thing = scene.layout(scene.data.qpos[None].copy())
            assert thing.sum() == counted and robot.sum() > counted and not (robot & thing).any()
            counts.append(counted)
    assert max(counts) > 150 and min(counts) < 0.7 * max(counts)
    away, near = scene.data.qpos.copy(), scene.data.qpos.copy()
    at = scene.model.joint("object").qposadr[0]
    away[at : at + 3], near[at : at + 3] = (-3, 0, 0), (0.5, 0, 0.02)
    scene.film(away[None])  # a picture without the object: it says nothing about the next one
    assert scene.object_pixels(np.stack((away, near))).tolist()[0] == 0 < scene.object_pixels(near[None])[0]
    env.close()


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_sees_the_fingers_and_what_is_between_them(camera):
    env = envs.make(envs.EnvConfig(cameras=(camera,)))
    env.reset(seed=0)
    scene = env.scene
    scene.place(scene.joints, scene.opening, scene.tcp_pos, np.array([1.0, 0, 0, 0]))
    for part, least in (("object", 25), ("finger", 10)):
        geoms, before = [i for i in range(scene.model.ngeom) if scene.model.geom(i).name.startswith(part)], scene.render()
        scene.model.geom_rgba[geoms, :3] = 1 - scene.model.geom_rgba[geoms, :3]  # what changes colour is the part
        assert (scene.render() != before).any(-1).sum() >= least
    env.close()


def test_what_is_out_of_view_is_not_drawn_and_changes_no_pixel(monkeypatch):
    env = envs.make(envs.EnvConfig(object="cup", cameras=("front", "side", "wrist"), randomization="strong", action_dim=7))
    rng, left_out = np.random.default_rng(0), 0
    for seed in range(6):
        env.reset(seed=seed)
        for _ in range(4):
            env.step(rng.uniform(-1, 1, 7))
            seen = env.scene.render()
            left_out += sum((~env.scene._in_view(camera)).sum() for camera in env.config.cameras)
            with monkeypatch.context() as patch:
                patch.setattr(env.scene, "_in_view", lambda camera: np.ones(env.scene.model.ngeom, bool))
                assert np.array_equal(env.scene.render(), seen)
    assert left_out > 24
    env.close()


def test_shadows_darken_the_table_and_follow_what_casts_them():
    env = envs.make(envs.EnvConfig())
    env.reset(seed=0)
    scene, places = env.scene, []
    for height in (0.0, 0.1):
        scene.place(scene.joints, scene.opening, np.array([0.5, 0.1, scene.spec.half_height + height]), np.array([1.0, 0, 0, 0]))
        shaded = scene.render().astype(int)
        casters, scene._renderer._casters = scene._renderer._casters, []
        plain = scene.render().astype(int)
        scene._renderer._casters = [i for i in casters if i in scene._things]
        change = scene.render().astype(int) - plain
        scene._renderer._casters = casters
        assert (shaded - plain).max() <= 0 and 0.005 < ((shaded - plain).min(-1) < -20).mean() < 0.1
        rows, columns = (change.min(-1) < -20).nonzero()
        places.append((rows.mean(), columns.mean()))
    off = np.subtract(places[1], places[0])
    assert np.hypot(*off) > 3  # pixels
    env.close()
