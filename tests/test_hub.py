"""V-JEPA 2's weights: equal outputs both ways, against transformers and against the published layout, and what is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

import worldmodel
from worldmodel import hub, model, vjepa2_ac
from worldmodel.commands import cli, energy
from worldmodel.encoder import EncoderConfig, VideoEncoder, fitted, patchify
from worldmodel.interface import Context, Features

transformers = pytest.importorskip("transformers", reason="pip install 'worldmodel[test]'")
SMALL = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2, "mlp_ratio": 48 / 11, "initializer_range": 0.2}


def theirs(**sizes):
    """A randomly initialised VJEPA2Model whose mask predictor is as small as it may be."""
    config = transformers.VJEPA2Config(
        **{**SMALL, **sizes}, pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.VJEPA2Model(config).eval()


def clip(frames: int, size: int, batch: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, frames, size, size, 3), dtype=np.uint8))


def prepared(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures as transformers' processor hands them on: [B, T, 3, h, w]."""
    mean, std = (torch.tensor(hub.IMAGENET[name]) for name in ("mean", "std"))
    return ((pixels / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def with_mask(network, pixels: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The encoder's layers over some tokens alone, as Meta's code masks; transformers masks after them."""
    x = network.encoder.embeddings(prepared(pixels))
    x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
    for layer in network.encoder.layer:
        x = layer(x, visible)[0]
    return network.encoder.layernorm(x)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def saved(network, folder):
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(theirs(), tmp_path_factory.mktemp("hub") / "small")


@torch.no_grad()
@pytest.mark.parametrize(("size", "frames"), [(256, 2), (256, 16), (384, 4)])
def test_the_encoder_computes_what_transformers_does(tmp_path, size, frames):
    network, pixels = theirs(crop_size=size), clip(frames, size)
    encoder = worldmodel.load_encoder(saved(network, tmp_path / "theirs"))
    assert encoder.config.mean == hub.IMAGENET["mean"] and encoder.config.image_size == size
    assert encoder.config.resize == size * 256 // 224
    wanted = network(prepared(pixels), skip_predictor=True).last_hidden_state
    assert apart(encoder(patchify(pixels, encoder.config)), wanted) < 1e-5
    some = torch.randperm(wanted.shape[1], generator=torch.Generator().manual_seed(0))[None, :50].sort()[0]
    assert apart(encoder(patchify(pixels, encoder.config), some), with_mask(network, pixels, some)) < 1e-5


@torch.no_grad()
def test_a_single_frame_is_as_good_as_its_repetition(folder):
    encoder, one = worldmodel.load_encoder(folder), clip(1, 256)
    twice = encoder(patchify(one.repeat(1, 2, 1, 1, 1), encoder.config))
    assert apart(encoder(patchify(one, encoder.config)), twice) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("width", "heads", "depth", "frames"), [(1024, 16, 24, 16), (1280, 16, 2, 64), (1408, 22, 2, 64)])
def test_metas_sizes_compute_what_transformers_does(tmp_path, width, heads, depth, frames):
    ratio = 48 / 11 if width == 1408 else 4.0
    network = theirs(hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth, mlp_ratio=ratio, initializer_range=0.02)
    pixels = clip(frames, 256)
    encoder = worldmodel.load_encoder(saved(network, tmp_path / "theirs"))
    wanted = network(prepared(pixels), skip_predictor=True).last_hidden_state
    assert apart(encoder(patchify(pixels, encoder.config)), wanted) < 1e-5


@torch.no_grad()
def test_our_encoder_becomes_theirs(tmp_path):
    config = EncoderConfig(48, patch_size=12, embed_dim=24, depth=2, num_heads=2, absolute=False, rope_base=1e4, rope_tiled=True)
    with torch.random.fork_rng():
        encoder, pixels = VideoEncoder(config), clip(4, 48, batch=2)
    network = transformers.VJEPA2Model.from_pretrained(hub.export(encoder, tmp_path / "ours"))
    x = ((pixels / 255 - 0.5) / 0.25).permute(0, 1, 4, 2, 3)
    found = network(x, skip_predictor=True).last_hidden_state
    assert apart(found, encoder(patchify(pixels, config))) < 1e-5
    again = worldmodel.load_encoder(tmp_path / "ours")
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), encoder.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="stem is 8, not 0.*--vjepa2-layout"):
        hub.export(VideoEncoder(EncoderConfig(48, embed_dim=24, num_heads=2, stem=8)), tmp_path / "no")


def original(encoder: VideoEncoder, prefix: str = "module.backbone.") -> dict:
    return {prefix + name: value for name, value in encoder.state_dict().items()} | {prefix + "pos_embed": torch.zeros(1, 4, 8)}


def test_original_checkpoints(tmp_path):
    config = EncoderConfig(256, patch_size=16, embed_dim=24, depth=2, num_heads=2)
    ours, ema = VideoEncoder(config), VideoEncoder(config)
    path = tmp_path / "vitl.pt"
    torch.save({"encoder": original(ours), "target_encoder": original(ema), "epoch": 3}, path)
    encoder = worldmodel.load_encoder(path, heads=2)
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert encoder.config.rope_tiled and encoder.config.resize == 292 and not encoder.config.absolute
    half = worldmodel.load_encoder(path, heads=2, dtype=torch.bfloat16)
    assert half.encode(clip(1, 256)).isfinite().all() and half.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="24 wide.*`heads`"):
        worldmodel.load_encoder(path)
    for change, wanted in (
        (lambda t: t.pop("module.backbone.blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is nothing"),
        (lambda t: t.update({"module.backbone.extra": torch.zeros(2)}), r"extra is \(2,\), expected nothing"),
        (lambda t: t.update({"module.backbone.norm.bias": torch.zeros(5)}), r"norm.bias is \(5,\), expected \(24,\)"),
        (lambda t: t.pop("module.backbone.patch_embed.proj.weight"), "patch_embed.proj.weight is missing"),
    ):
        tensors = original(ours)
        change(tensors)
        torch.save({"encoder": tensors}, path)
        with pytest.raises(ValueError, match=wanted):
            worldmodel.load_encoder(path, heads=2)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole PyTorch checkpoint"):
        worldmodel.load_encoder(path)
    torch.save({"encoder": math.sqrt}, path)  # a pickle that names a function
    with pytest.raises(ValueError, match="checkpoint of tensors"):
        worldmodel.load_encoder(path)
    with pytest.raises(FileNotFoundError, match="facebookresearch/vjepa2"):
        worldmodel.load_encoder(tmp_path / "none.pt")


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        worldmodel.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert', expected 'vjepa2'"):
        worldmodel.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vjepa2"}')
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        worldmodel.load_encoder(tmp_path)


def test_pictures_are_resized_and_cropped_as_the_config_says():
    config = EncoderConfig(32, patch_size=16, embed_dim=12, depth=1, num_heads=1, resize=36)
    wide = torch.arange(64, dtype=torch.uint8).mul(4)[None, None, :, None].expand(2, 72, -1, 3).contiguous()
    seen = fitted(wide, config)
    assert seen.shape == (2, 32, 32, 3)
    assert abs(float(seen[0, 16, 16, 0]) - 4 * 32) < 8  # the middle stays the middle
    same = torch.zeros(36, 36, 3, dtype=torch.uint8)
    same[2:34, 2:34] = 7
    assert (fitted(same, config) == 7).all()
    with pytest.raises(ValueError, match="resize is 20"):
        EncoderConfig(32, patch_size=16, resize=20)


# V-JEPA 2-AC

SIZES = vjepa2_ac.ACConfig(feature_dim=24, grid=(2, 2), embed_dim=96, depth=2, num_heads=3)


@pytest.fixture
def predictor():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = vjepa2_ac.ACPredictor(SIZES).eval()
        for weight in made.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return made.requires_grad_(False)


def spelled_out(p: vjepa2_ac.ACPredictor, patches, changes, states) -> torch.Tensor:
    """The predictor token by token, as the paper and the published layout have it."""
    b, t, n, _ = patches.shape
    tokens, places = [], []
    for step in range(t):
        tokens += [p.action_encoder(changes[:, step]), p.state_encoder(states[:, step])]
        places += [(step, None), (step, None)]
        for patch in range(n):
            tokens.append(p.predictor_embed(patches[:, step, patch]))
            places.append((step, divmod(patch, SIZES.grid[1])))
    x = torch.stack(tokens, 1)
    heads, size = SIZES.num_heads, SIZES.embed_dim // SIZES.num_heads
    part = 2 * (size // 3 // 2)
    speed = [10000 ** -(i / (part / 2)) for i in range(part // 2)]

    def turned(vector, place):
        out = vector.clone()
        for axis, at in enumerate((place[0], *(place[1] or ()))):
            for i in range(part):
                angle, here = at * speed[i % (part // 2)], axis * part + i
                other = -vector[here + 1] if i % 2 == 0 else vector[here - 1]
                out[here] = vector[here] * math.cos(angle) + other * math.sin(angle)
        return out

    for block in p.predictor_blocks:
        y = block.norm1(x)
        q, k, v = (part.unflatten(-1, (heads, size)) for part in F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, -1))
        new = torch.zeros_like(q)
        for i in range(b):
            for head in range(heads):
                rq = torch.stack([turned(q[i, j, head], place) for j, place in enumerate(places)])
                rk = torch.stack([turned(k[i, j, head], place) for j, place in enumerate(places)])
                for j, place in enumerate(places):
                    seen = [m for m, other in enumerate(places) if other[0] <= place[0]]
                    weight = (rk[seen] @ rq[j] / math.sqrt(size)).softmax(0)
                    new[i, j, head] = weight @ v[i, seen, head]
        x = x + block.attn.proj(new.flatten(2))
        x = x + block.mlp(block.norm2(x))
    x = x.unflatten(1, (t, n + 2))[:, :, 2:]
    return p.predictor_proj(p.predictor_norm(x))


def inputs(t: int = 3):
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return F.layer_norm(draw(1, t, 4, 24), (24,)), 0.1 * draw(1, t, 7), draw(1, t, 7)


def test_the_predictor_is_the_published_one(predictor):
    patches, changes, states = inputs()
    found, _ = predictor.tokens(patches, changes, states)
    assert apart(found, spelled_out(predictor, patches, changes, states)) < 1e-5


def test_frame_by_frame_is_as_good_as_all_at_once(predictor):
    patches, changes, states = inputs()
    whole, _ = predictor.tokens(patches, changes, states)
    cache, steps = None, []
    for t in range(3):
        now, cache = predictor.tokens(patches[:, t : t + 1], changes[:, t : t + 1], states[:, t : t + 1], cache, t)
        steps.append(now)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_names_are_those_of_the_published_weights(predictor):
    roots = {name.split(".")[0] for name in predictor.state_dict()}
    assert roots == {
        "predictor_embed", "action_encoder", "state_encoder", "extrinsics_encoder", "predictor_blocks", "predictor_norm",
        "predictor_proj",
    }  # fmt: skip
    inside = {name.split(".", 2)[2] for name in predictor.state_dict() if name.startswith("predictor_blocks.0.")}
    names = "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
    assert inside == {f"{name}.{end}" for name in names for end in ("weight", "bias")}


def test_states_move_as_rotations_do():
    rng = np.random.default_rng(0)
    states, changes = rng.normal(size=(50, 7)), 0.3 * rng.normal(size=(50, 7))
    states[:, 6] = rng.uniform(0, 1, 50)
    after = vjepa2_ac.moved(torch.from_numpy(states), torch.from_numpy(changes)).numpy()
    np.testing.assert_allclose(after[:, :3], states[:, :3] + changes[:, :3])
    wanted = Rotation.from_euler("xyz", changes[:, 3:6]) * Rotation.from_euler("xyz", states[:, 3:6])
    np.testing.assert_allclose(after[:, 3:6], wanted.as_euler("xyz"), atol=1e-9)
    np.testing.assert_allclose(after[:, 6], (states[:, 6] + changes[:, 6]).clip(0, 1))
    back = vjepa2_ac.change(torch.from_numpy(states), torch.from_numpy(after)).numpy()
    turn = (Rotation.from_euler("xyz", back[:, 3:6]) * Rotation.from_euler("xyz", changes[:, 3:6]).inv()).magnitude()
    assert turn.max() < 1e-6


@pytest.fixture
def ac(tmp_path, predictor):
    """A checkpoint of V-JEPA 2-AC in the original layout, small."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = VideoEncoder(EncoderConfig(32, patch_size=16, embed_dim=24, depth=1, num_heads=2))
    path = tmp_path / "vjepa2-ac-small.pt"
    tensors = {f"module.{name}": value for name, value in predictor.state_dict().items()}
    torch.save({"encoder": original(encoder, "module."), "predictor": tensors}, path)
    return path


def test_v_jepa_2_ac_is_a_world_model(tmp_path, ac):
    world = hub.load_ac(ac, config=SIZES, heads=2)
    assert (world.action_dim, world.latent_dim, world.max_context) == (7, 0, 1)
    pixels, states = clip(1, 40)[0], torch.tensor([[0.4, 0.0, 0.3, 3.1, 0.0, -1.9, 0.2]])
    now = world.encode({"pixels": pixels.numpy(), "proprio": states.numpy()})
    context = Context(Features(now.patches[None], now.proprio[None]), torch.zeros(1, 0, 7))
    actions = torch.rand(1, 5, 2, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    imagined = world.rollout(context, actions, world.sample_z((1, 5, 2, 2), torch.Generator().manual_seed(0)))
    assert imagined.patches.shape == (1, 5, 2, 2, 4, 24) and torch.equal(imagined.patches[:, :, 0], imagined.patches[:, :, 1])
    torch.testing.assert_close(imagined.proprio[0, :, 0, 0, :3], states[:, :3] + 0.075 * actions[0, :, 0, :3])
    assert imagined.proprio[..., 6].min() >= 0 and imagined.proprio[..., 6].max() <= 1
    world.save(tmp_path / "ac.safetensors")
    again = model.load(tmp_path / "ac.safetensors")
    assert torch.equal(again.rollout(context, actions, torch.zeros(1, 5, 1, 2, 0)).patches, imagined.patches[:, :, :1])
    with pytest.raises(ValueError, match="expected 'encoder' and 'predictor'"):
        torch.save({"encoder": {}}, tmp_path / "half.pt")
        hub.load_ac(tmp_path / "half.pt")


# Commands


def call(*args) -> int:
    return cli.main([str(arg) for arg in args])


def test_convert_there_and_back(tmp_path, folder, capsys):
    assert call("convert", "--source", folder, "--out", tmp_path / "e.safetensors") == 0
    assert "resized to 292" in capsys.readouterr().out
    assert call("convert", "--source", tmp_path / "e.safetensors", "--to", "transformers", "--out", tmp_path / "back") == 0
    one, two = worldmodel.load_encoder(folder), worldmodel.load_encoder(tmp_path / "back")
    assert one.config == two.config
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert call("convert", "--source", folder, "--out", tmp_path / "e.safetensors") == 2
    assert call("convert", "--source", folder, "--dtype", "bfloat16", "--out", tmp_path / "h.safetensors") == 0
    assert worldmodel.load_encoder(tmp_path / "h.safetensors").norm.weight.dtype == torch.bfloat16
    assert call("convert", "--source", "random:vits", "--out", tmp_path / "r.safetensors") == 2


def trajectory(path, t: int = 3):
    rng = np.random.default_rng(0)
    states = np.cumsum(rng.normal(0, 0.02, (1, t, 7)), 1).astype(np.float32)
    np.savez(path, observations=rng.integers(0, 256, (1, t, 64, 64, 3), dtype=np.uint8), states=states)
    return path


def test_energy_of_a_recorded_action(tmp_path, ac, capsys):
    path = trajectory(tmp_path / "t.npz")
    assert call("energy", "--trajectory", path, "--out", tmp_path / "ours", "--grid", 3, "--samples", 4) == 0
    assert "planned" in capsys.readouterr().out and (tmp_path / "ours" / "energy.png").stat().st_size > 10_000
    hub.load_ac(ac, config=SIZES, heads=2).save(tmp_path / "ac.safetensors")
    words = "energy", "--trajectory", path, "--model", tmp_path / "ac.safetensors", "--grid", 3
    assert call(*words, "--step", 1, "--out", tmp_path / "meta") == 0
    capsys.readouterr()
    for given in ((), ("--model", tmp_path / "ac.safetensors")):
        out = tmp_path / f"offline{len(given)}"
        assert call("bench", "--trajectory", path, *given, "--samples", 4, "--iterations", 1, "--out", out) == 0
        assert "2 recorded steps" in capsys.readouterr().out and (out / "results.json").exists()
    assert call("bench", "--trajectory", path, "--policy", "expert", "--out", tmp_path / "no") == 2
    assert call(*words, "--step", 2, "--out", tmp_path / "late") == 2
    assert "expected at most 1" in capsys.readouterr().err
    assert call("energy", "--trajectory", tmp_path / "none.npz", "--out", tmp_path / "no") == 2
    np.savez(tmp_path / "bad.npz", observations=np.zeros((2, 8, 8, 3)), states=np.zeros((2, 7)))
    with pytest.raises(ValueError, match="float64"):
        energy.recorded(tmp_path / "bad.npz")


def test_an_encoder_pretrained_in_v_jepa_2s_layout_exports(tmp_path):
    assert call("collect", "--preset", "debug", "--out", tmp_path / "data") == 0
    words = "pretrain", "--preset", "debug", "--data", tmp_path / "data", "--vjepa2-layout", "--out", tmp_path / "run"
    assert call(*words) == 0
    made = tmp_path / "run" / "encoder.safetensors"
    assert call("convert", "--source", made, "--to", "transformers", "--out", tmp_path / "hf") == 0
    network, encoder = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf"), worldmodel.load_encoder(made)
    pixels = clip(2, encoder.config.image_size)
    with torch.no_grad():
        x = ((pixels / 255 - 0.5) / 0.25).permute(0, 1, 4, 2, 3)
        found = network(x, skip_predictor=True).last_hidden_state
        assert apart(found, encoder(patchify(pixels, encoder.config))) < 1e-5


def test_a_folder_of_a_run_is_told_from_a_model_of_others(tmp_path):
    (tmp_path / "encoder.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a folder of a run: give the file, .*encoder\.safetensors"):
        worldmodel.load_encoder(tmp_path)


def test_damaged_files_are_named(tmp_path, folder):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        worldmodel.load_encoder(broken)
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        worldmodel.load_encoder(broken)
    for state in ({"encoder": torch.zeros(3)}, {"encoder": {}, "predictor": None}):
        torch.save(state, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="expected tensors by their names"):
            worldmodel.load_encoder(tmp_path / "odd.pt")
    assert call("convert", "--source", tmp_path / "none.safetensors", "--out", tmp_path / "x") == 2


def test_an_encoder_of_ours_works_in_half_precision(tmp_path):
    with torch.random.fork_rng():
        made = VideoEncoder(EncoderConfig(24, embed_dim=24, depth=1, num_heads=2, stem=16))
    hub.save_encoder(tmp_path / "e.safetensors", made, {})
    half, pixels = worldmodel.load_encoder(tmp_path / "e.safetensors", dtype=torch.bfloat16), clip(1, 24)[0]
    assert (half.encode(pixels) - made.encode(pixels)).abs().mean() < 0.05
    with pytest.raises(ValueError, match="leave out dtype"):
        hub.load_any(model.shipped(), torch.bfloat16)
