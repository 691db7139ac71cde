"""Tasks and experts: what counts as success, and that the scripts earn it."""

import mujoco
import numpy as np
import pytest

import envs
from envs.experts import BEHAVIOURS, Careful, make_policy
from envs.randomize import LEVELS, SHIFTS
from envs.run import rollout
from envs.scene import OBJECTS, POSTS
from envs.tasks import MIN_TRAVEL, TASKS, Achieved, Wanted

pytestmark = pytest.mark.filterwarnings("error")
TARGET = np.array([0.5, 0.0, 0.0225])


def states(**fields) -> Achieved:
    """Return a batch of states; what is not given is placed, at rest, untouched, hand 9 cm up, nothing held."""
    count = max(len(np.atleast_2d(v)) if k in ("tcp", "object_pos") else len(np.atleast_1d(v)) for k, v in fields.items())
    plain = {
        "tcp": np.tile(TARGET + [0, 0, 0.09], (count, 1)),
        "object_pos": np.tile(TARGET, (count, 1)),
        "object_speed": np.zeros(count),
        "touched": np.zeros(count, bool),
        "grasped": np.zeros(count, bool),
        "held_steps": np.zeros(count, int),
    }
    return Achieved(**{**plain, **{key: np.asarray(value) for key, value in fields.items()}})


def judge(task: str, **fields) -> list[bool]:
    return TASKS[task].success(states(**fields), Wanted(TARGET)).tolist()


def test_pick_place_wants_all_of_it():
    x = np.array([1.0, 0, 0])
    assert judge("pick-place", object_pos=[TARGET, TARGET + 0.029 * x, TARGET + 0.031 * x]) == [True, True, False]
    assert judge("pick-place", object_pos=[TARGET + [0, 0, 0.031], TARGET + [0.02, 0.02, 0.02]]) == [False, False]
    assert judge("pick-place", object_speed=[0.0, 0.019, 0.021]) == [True, True, False]
    assert judge("pick-place", touched=[False, True]) == [True, False]
    assert judge("pick-place", tcp=[TARGET + [0, 0, 0.051], TARGET + [0, 0, 0.049]]) == [True, False]


def test_reach_wants_two_centimetres():
    x = np.array([1.0, 0, 0])
    assert judge("reach", tcp=[TARGET + 0.019 * x, TARGET + 0.021 * x, TARGET + [0.015, 0.015, 0]]) == [True, False, False]


def test_grasp_wants_a_second():
    assert judge("grasp", grasped=[True, True, False], held_steps=[5, 4, 5]) == [True, False, False]


def test_reach_with_object_wants_it_held():
    x = np.array([1.0, 0, 0])
    near = [TARGET, TARGET, TARGET + 0.031 * x]
    assert judge("reach-with-object", object_pos=near, grasped=[True, False, True]) == [True, False, False]


def test_success_is_batched_over_any_shape():
    flat = states(object_pos=np.tile(TARGET, (6, 1)))
    shaped = Achieved(**{k: getattr(flat, k).reshape(2, 3, *getattr(flat, k).shape[1:]) for k in flat.__dataclass_fields__})
    for task in TASKS.values():
        assert task.success(shaped, Wanted(TARGET)).shape == (2, 3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("object", OBJECTS)
def test_draws_are_fair(task, object):
    rng = np.random.default_rng(0)
    for _ in range(200):
        episode = TASKS[task].draw(object, rng)
        start, target = episode.start, episode.wanted.target
        if task != "grasp":
            origin = start.tcp if task == "reach" else start.object_pos
            assert np.linalg.norm(target - origin) >= MIN_TRAVEL
        if task != "reach-with-object":
            assert np.linalg.norm(start.tcp[:2] - start.object_pos[:2]) <= 0.121 and 0.1 <= start.tcp[2] <= 0.22
        assert len(episode.subgoals) == {"pick-place": 3, "pick-place-fragile": 3, "grasp": 2}.get(task, 1)
        assert 1 <= len(episode.posts) <= POSTS if task == "pick-place-fragile" else not len(episode.posts)
        for end in (start.object_pos, target) if len(episode.posts) else ():  # the hand that grasps or lets go touches none
            assert (abs(episode.posts - end[:2]) > [0.035, 0.10]).any(1).all()


@pytest.mark.parametrize("object", OBJECTS)
@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds(task, object):
    env = envs.make(envs.EnvConfig(task=task, object=object, render_goals=False, image_size=16))
    for seed in range(6):
        policy = make_policy("expert", env.config, np.random.default_rng(seed))
        record = rollout(env, lambda obs, info, policy=policy: policy(info), seed)
        assert record.success and len(record.actions) <= 22, f"seed {seed}"
        assert not record.infos[0]["success"]
        assert not any("post_force" in info["unsafe"] for info in record.infos)
    env.close()


def test_who_minds_the_posts_touches_none():
    env = envs.make(envs.EnvConfig("pick-place-fragile", render_goals=False, image_size=16))
    for seed in range(12):
        policy = make_policy("varied", env.config, np.random.default_rng(seed))
        record = rollout(env, lambda obs, info, policy=policy: policy(info), seed)
        assert record.success and not any("post_force" in info["unsafe"] for info in record.infos), f"seed {seed}"
    env.close()


def test_slippery_things_slip():
    """What counts in a grip is what the contact says, whatever the object's own friction."""
    slid = []
    for level in ("none", "slippery"):
        env = envs.make(envs.EnvConfig("reach-with-object", randomization=level, render_goals=False, image_size=16))
        env.reset(seed=0)
        fingers = [env.scene.model.geom(f"finger_{side}").id for side in ("left", "right")]
        contact = env.scene.data.contact
        slid.append(contact.friction[np.isin(contact.geom, fingers).any(1), 0].max())
        env.close()
    assert slid[1] < 0.2 * slid[0]


@pytest.mark.parametrize("object", OBJECTS)
@pytest.mark.parametrize("level", ["none", "heavy", "hidden"])
def test_mass_is_weight_and_inertia(level, object):
    env = envs.make(envs.EnvConfig(object=object, randomization=level, render_goals=False, image_size=16))
    env.reset(seed=0)
    scene, body = env.scene, env.scene.model.body("object").id
    mass, dof = scene.model.body_mass[body], scene.model.body_dofadr[body]
    assert (mass > 0.3) == (level == "heavy")
    for push in (0.0, 1.0):  # N, along x
        scene.place(scene.joints, scene.opening, np.array([0.5, 0.0, 0.5]), np.array([1.0, 0, 0, 0]))
        scene.data.qvel[:] = 0
        scene.data.xfrc_applied[body, 0] = push
        mujoco.mj_forward(scene.model, scene.data)
        assert np.allclose(scene.data.qacc[dof : dof + 3], [push / mass, 0, -9.81], atol=1e-2)
    env.close()


@pytest.mark.parametrize("object", OBJECTS)
def test_slippery_things_slide(object):
    slid = []
    for level in ("none", "slippery"):
        env = envs.make(envs.EnvConfig("reach", object=object, randomization=level, render_goals=False, image_size=16))
        env.reset(seed=0)
        scene, dof = env.scene, env.scene.model.joint("object").dofadr[0]
        start = scene.object_pos
        scene.data.qvel[dof] = 0.4  # m/s
        for _ in range(100):
            mujoco.mj_step(scene.model, scene.data)
        slid.append(np.linalg.norm(scene.object_pos - start))
        env.close()
    assert slid[1] > 1.8 * slid[0]


@pytest.mark.parametrize("level", ["none", "mild", "colours"])
def test_the_table_has_its_materials_colour(level):
    env = envs.make(envs.EnvConfig(randomization=level, render_goals=False))
    env.reset(seed=0)
    before = env.scene.render()
    env.scene.model.mat_rgba[:, 0] = 0
    assert (env.scene.render() != before).any(-1).mean() > 0.3
    env.close()


@pytest.mark.parametrize("level", LEVELS)
def test_expert_succeeds_in_randomised_scenes(level):
    env = envs.make(envs.EnvConfig("pick-place-fragile", randomization=level, render_goals=False, image_size=16))
    done = []
    for seed in range(4 if level in SHIFTS else 8):
        policy = make_policy("expert", env.config, np.random.default_rng(seed))
        done.append(rollout(env, lambda obs, info, policy=policy: policy(info), seed).success)
    env.close()
    assert sum(done) >= len(done) - 1


@pytest.mark.parametrize("behaviour", ["noisy", "failing", "play"])
def test_seven_dimensions_are_played_with(behaviour):
    config = envs.EnvConfig(action_dim=7, render_goals=False, image_size=16, stop_on_success=False, max_steps=25)
    env, off = envs.make(config), []
    for seed in range(6):
        policy = make_policy(behaviour, config, np.random.default_rng(seed))
        off.append(abs(rollout(env, lambda obs, info, policy=policy: policy(info), seed).obs["proprio"][:, 3:6]))  # rad, from straight down
    env.close()
    off = np.stack(off)  # [6, T, 3]
    assert (off.max((0, 1)) > 0.15).all() and off.max() < 1.0
    assert (off.max(2) < 0.1)[:, 5:].any(1).sum() >= 4  # and back


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviours_stay_in_bounds_and_repeat(behaviour):
    env = envs.make(envs.EnvConfig(render_goals=False, image_size=16, stop_on_success=False, max_steps=15))
    policies = [make_policy(behaviour, env.config, np.random.default_rng(3)) for _ in range(2)]
    first, second = (rollout(env, lambda obs, info, policy=policy: policy(info), 3) for policy in policies)
    env.close()
    assert first.actions.shape == (15, 4) and np.abs(first.actions).max() <= 1
    assert np.array_equal(first.actions, second.actions) and np.array_equal(first.obs["pixels"], second.obs["pixels"])


def test_bad_data_has_what_goes_wrong():
    """Failing and playing episodes show misses, drops and pushes, not successes alone."""
    env = envs.make(envs.EnvConfig(render_goals=False, image_size=16, stop_on_success=False))
    failing = [
        rollout(env, lambda obs, info, policy=make_policy("failing", env.config, np.random.default_rng(s)): policy(info), s)
        for s in range(8)
    ]
    env.close()
    moved = [np.linalg.norm(np.diff(r.privileged("object_pos"), axis=0), axis=1).max() > 0.01 for r in failing]
    assert sum(r.success for r in failing) <= 6 and any(moved)


def test_a_hasty_hand_comes_down_aslant_and_presses():
    env = envs.make(envs.EnvConfig(object="cup", render_goals=False, image_size=16, stop_on_success=False, max_steps=20))
    hasty, aslant = [], []
    for seed in range(8):
        policy, unsafe = make_policy("hasty", env.config, np.random.default_rng(seed)), []

        def act(obs, info, policy=policy, unsafe=unsafe):
            unsafe.append(bool(info["unsafe"]))
            return policy(info)

        first = rollout(env, act, seed).actions[0]
        aslant.append(first[2] < 0 and np.linalg.norm(first[:2]) > 0.1)
        hasty.append(any(unsafe))
    env.close()
    assert sum(hasty) >= 3 and sum(aslant) >= 5


@pytest.mark.parametrize("object", ["box", "cup"])
def test_a_careful_hand_hurts_nothing_and_finds_back(object):
    env = envs.make(envs.EnvConfig("pick-place-fragile", object, render_goals=False, image_size=16))
    plain, jolted = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        careful = Careful(env.config, rng), make_policy("careful", env.config, rng)
        first, second = (rollout(env, lambda obs, info, policy=policy: policy(info), seed) for policy in careful)
        plain.append(first.success and not any(info["unsafe"] for info in first.infos))
        jolted.append(second.success)
    env.close()
    assert all(plain) and sum(jolted) >= 7


def test_a_careful_hand_needs_no_memory():
    """Its action is the same whatever it did before."""
    env = envs.make(envs.EnvConfig("pick-place-fragile", render_goals=False, image_size=16))
    policy, infos = Careful(env.config, np.random.default_rng(0)), []

    def act(obs, info):
        infos.append(info)
        return policy(info)

    actions = rollout(env, act, 0).actions
    env.close()
    fresh = [Careful(env.config, np.random.default_rng(0))(info) for info in infos]
    assert np.array_equal(actions, np.stack(fresh))


def test_unknown_behaviour_is_named():
    with pytest.raises(ValueError, match="mixture"):
        make_policy("dance", envs.EnvConfig(), np.random.default_rng(0))
