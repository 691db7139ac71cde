"""Imagination by OpenVINO: the numbers of torch's."""

import copy
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldmodel.commands import speed
from worldmodel.compiled import CompiledImaginer, Graph, library
from worldmodel.imaginer import Imaginer
from worldmodel.interface import Context, Features
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig

pytestmark = pytest.mark.skipif(library() is None, reason="OpenVINO is not installed (the extra `fast`)")

ROOT = Path(__file__).parents[1]
SIZES = PredictorConfig(feature_dim=48, grid=(4, 4), latent_dim=3, embed_dim=48, depth=2, num_heads=2)


def noisy(predictor: Predictor) -> Predictor:
    """All weights are drawn, those that begin as zeros too."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in predictor.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    predictor.proprio_mean.fill_(0.3)
    predictor.proprio_std.fill_(0.2)
    return predictor.eval()


def problem(predictor: Predictor, b: int, m: int, horizon: int, past: int, own: Predictor | None = None) -> tuple:
    """What `rollout` takes, with a cache of `own`'s."""
    g, config = torch.Generator().manual_seed(3), predictor.config
    patches = torch.nn.functional.layer_norm(torch.randn(b, past + 1, predictor.patches, config.feature_dim, generator=g), (config.feature_dim,))
    seen = Features(patches, torch.randn(b, past + 1, 7, generator=g))
    actions, noise = torch.rand(b, m, horizon, 4, generator=g), torch.randn(b, m, horizon, config.latent_dim, generator=g)
    before = seen.map(lambda x: x[:, :past]), torch.rand(b, past, 4, generator=g), torch.randn(b, past, config.latent_dim, generator=g)
    cache = (own or predictor)(*before)[1] if past else None
    return seen.map(lambda x: x[:, past]), cache, past, actions, noise


def compiled(predictor: Predictor, dtype: torch.dtype, now: Features, cache, *others) -> Features:
    imaginer = CompiledImaginer(predictor, dtype)
    return imaginer.rollout(now, imaginer.laid(cache), *others)


@torch.no_grad()
@pytest.mark.parametrize(("b", "m", "horizon", "past", "sizes"), [
    (1, 3, 5, 0, {}), (1, 3, 5, 1, {}), (1, 1, 1, 2, {}), (1, 65, 2, 2, {}), (2, 3, 5, 2, {}), (3, 1, 2, 1, {}),
    (1, 3, 5, 2, {"merge": 1}), (2, 3, 2, 2, {"merge": 4}), (1, 3, 4, 0, {"window": 1}), (2, 2, 4, 1, {"window": 2}), (1, 2, 3, 2, {"grid": (4, 8)}),
    (1, 3, 3, 2, {"gated": True}), (2, 3, 3, 1, {"hidden": 20}), (2, 2, 3, 2, {"hidden": 20, "gated": True, "merge": 1}),
])  # fmt: skip
def test_what_is_compiled_imagines_the_same(b, m, horizon, past, sizes):
    predictor = noisy(Predictor(replace(SIZES, **sizes)))
    asked = problem(predictor, b, m, horizon, past)
    for name, ours, wanted in zip(Features._fields, compiled(predictor, torch.float32, *asked), Imaginer(predictor, torch.float32).rollout(*asked)):
        assert ours.shape == wanted.shape and not ours.is_inference()
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
@pytest.mark.parametrize("b", [1, 3])
def test_in_bfloat16_it_is_off_no_further_than_torch(b):
    predictor = noisy(Predictor(SIZES))
    exact, rough = Imaginer(predictor, torch.float32), Imaginer(predictor, torch.bfloat16)
    truth = exact.rollout(*problem(predictor, b, 8, 3, 2))
    asked = problem(predictor, b, 8, 3, 2, rough.predictor)
    for ours, torchs, true in zip(compiled(predictor, torch.bfloat16, *asked), rough.rollout(*asked), truth):
        assert float((ours - true).abs().mean()) < 1.5 * float((torchs - true).abs().mean()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_knows_neither_later_ones_nor_other_plans(dtype):
    predictor = noisy(Predictor(SIZES))
    now, cache, start, actions, noise = problem(predictor, 1, 5, 4, 2)
    whole = compiled(predictor, dtype, now, cache, start, actions, noise)
    part = compiled(predictor, dtype, now, cache, start, actions[:, 1:3, :2], noise[:, 1:3, :2])
    for a, b in zip(whole, part):
        torch.testing.assert_close(a[:, 1:3, :2], b, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_same_twice_and_in_several_threads():
    predictor = noisy(Predictor(SIZES))
    now, cache, *others = problem(predictor, 1, 4, 2, 2)
    imaginer, seen = CompiledImaginer(predictor, torch.float32), []
    past = imaginer.laid(cache)
    first = imaginer.rollout(now, past, *others)
    kept = first.map(torch.clone)
    asking = [threading.Thread(target=lambda: seen.append(imaginer.rollout(now, past, *others))) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    imaginer.rollout(now, past, others[0], -others[1], others[2])
    for one in (first, *seen):  # nor does a later call write over what an earlier one gave
        assert all(torch.equal(a, b) for a, b in zip(one, kept))
    assert len(seen) == 4


def test_who_it_is_for():
    plain = Predictor(SIZES)
    assert CompiledImaginer.fits(plain)
    assert not CompiledImaginer.fits(Predictor(replace(SIZES, codes=True)))
    assert not CompiledImaginer.fits(copy.deepcopy(plain).half())
    assert not CompiledImaginer.fits(torch.nn.Linear(1, 1))


def test_a_model_says_whether_it_may():
    model = load()
    context, actions, z = asked_of(model)
    assert model.imagined_by == "openvino"
    ours = model.rollout(context, actions, z)
    model.compiled = False
    assert model.imagined_by == "torch"
    for a, b in zip(ours, model.rollout(context, actions, z)):
        assert float((a - b).abs().mean()) < (0.06 if a.shape[-1] > 7 else 1e-3)  # in bfloat16, where the processor has it


def test_operations_are_counted_whatever_imagines():
    """Some 70 million for a step of a candidate of the shipped predictor, and its share of the context."""
    model = load()
    ours = model.rollout
    model.rollout = lambda *asked: ours(*asked)  # as where the time is taken
    told = speed.rollouts(model, 4, 2)
    assert told["imagined_by"] == "openvino" == model.imagined_by
    for prefix in ("", "many_"):
        assert 6e7 < 1e9 * told[f"{prefix}rollout_gflops"] / told[f"{prefix}candidate_steps_per_second"] < 1.2e8


def asked_of(model: LatentModel) -> tuple[Context, torch.Tensor, torch.Tensor]:
    """A context of three frames and what to imagine of it."""
    g, config = torch.Generator().manual_seed(3), model.predictor.config
    patches = torch.randn(1, 3, model.predictor.patches, config.feature_dim, generator=g)
    features = Features(torch.nn.functional.layer_norm(patches, patches.shape[-1:]), torch.randn(1, 3, config.proprio_dim, generator=g))
    context = Context(features, torch.rand(1, 2, config.action_dim, generator=g))
    return context, torch.rand(1, 3, 2, config.action_dim, generator=g), model.sample_z((1, 3, 1, 2), None)


IMPORTED = """
import os, sys
forked = []
sys.addaudithook(lambda event, _: forked.append(event) if event in ("os.fork", "socket.connect") else None)
import worldmodel.compiled
print(worldmodel.compiled.library() is not None, forked)
"""


@pytest.mark.parametrize(("asked", "told"), [(None, "True []"), ("avx2", "False []")])
def test_it_is_imported_quietly_and_not_where_less_is_asked_of_torch(asked, told):
    env = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"} | ({"ATEN_CPU_CAPABILITY": asked} if asked else {})
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


INTERRUPTED = """
import signal
from tests.test_compiled import *
predictor = noisy(Predictor(SIZES))
imaginers, (now, _, *asked) = [CompiledImaginer(predictor, torch.float32) for _ in range(3)], problem(predictor, 1, 1, 1, 0)
for imaginer in imaginers:
    imaginer.rollout(now, imaginer.laid(None), *asked)
del imaginer
while imaginers:
    del imaginers[0]
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_is_one_after_graphs_have_come_and_gone():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_one_that_cannot_be_loaded_is_named_and_done_without(monkeypatch, caplog):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "openvino":
                raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    assert library.__wrapped__() is None and "libtbb.so.12" in caplog.text


def test_what_does_not_compile_says_how_to_do_without(monkeypatch):
    def refused(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("worldmodel.compiled.core", lambda: SimpleNamespace(compile_model=refused))
    predictor = noisy(Predictor(SIZES))
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot compile.*model.compiled = False.*no such operation"):
        compiled(predictor, torch.float32, *problem(predictor, 1, 2, 1, 0))


@torch.no_grad()
def test_graphs_asked_for_last_are_kept_and_others_go(monkeypatch):
    predictor = noisy(Predictor(SIZES))
    imaginer, asked = CompiledImaginer(predictor, torch.float32), problem(predictor, 1, 6, 1, 0)
    now, _, start, actions, noise = asked
    past = imaginer.laid(None)
    monkeypatch.setattr("worldmodel.compiled.KEPT", 4)
    for m in range(1, 7):
        imaginer.rollout(now, past, start, actions[:, :m], noise[:, :m])
        imaginer.rollout(now, past, start, actions[:, :1], noise[:, :1])
    assert {m for _, m, *_ in imaginer._compiled} == {1, 4, 5, 6}


def test_weights_are_let_go():
    predictor = noisy(Predictor(SIZES))
    graph = Graph(predictor)
    seen = weakref.ref(graph)
    del graph
    assert seen() is None


DECIDED = """
import sys
import numpy as np
import envs
from envs.experts import make_policy
from planners.agent import Agent, AgentConfig
from planners.sampling import GUIDED, SamplingPlanner
from worldmodel import model
from worldmodel.energy import GoalEnergy

world, decided = model.load(), []
agent = Agent(world, SamplingPlanner(GUIDED), GoalEnergy, AgentConfig(), hazard=world.hazard)
with envs.make(envs.EnvConfig("pick-place")) as env:
    obs, info = env.reset(seed=8400)
    agent.reset({"pixels": info["goal"]["pixels"]})
    act = make_policy("expert", env.config, np.random.default_rng(0))
    for _ in range(8):
        decided.append(agent.act(obs))
        obs, *_, info = env.step(act(info))
np.save(sys.argv[1], decided)
"""


def test_decisions_are_the_same_whatever_the_processor_can(tmp_path):
    told = []
    for asked in ("", "avx2"):
        env = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"} | ({"ATEN_CPU_CAPABILITY": asked} if asked else {})
        path = tmp_path / f"decided{asked}.npy"
        subprocess.run([sys.executable, "-c", DECIDED, path], cwd=ROOT, env=env, check=True)
        told.append(np.load(path))
    off = np.abs(told[0] - told[1])
    assert off.max() < 0.1 and np.median(off) < 0.01  # of 5 cm
