"""Encoders and models from files: our own, Meta's V-JEPA 2 and V-JEPA 2-AC, and others' by name.

Meta's weights (arXiv 2506.09985) come as a Hugging Face folder or repository of `VJEPA2Model`, or as the original
checkpoints (`vitl.pt`, `vith.pt`, `vitg.pt`, `vitg-384.pt`, `vjepa2-ac-vitg.pt`). All become a `VideoEncoder`, whose config
has what is done to pictures, or a `LatentModel`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from worldmodel.checkpoint import fill, load_tensors, read_header, save_tensors
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel import model
from worldmodel.interface import Encoder
from worldmodel.model import LatentModel
from worldmodel.peers import EFFICIENTNET, EfficientNet, build
from worldmodel.vjepa2_ac import NAME as AC
from worldmodel.vjepa2_ac import ACConfig, ACPredictor

RANDOM = "random:"  # before the name of a size: random weights instead of a file
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LAYOUT = {"patch_size": 16, "absolute": False, "rope_base": 10000.0, "rope_tiled": True, **IMAGENET}
_HEADS = {1024: 16, 1280: 16, 1408: 22}  # of ViT-L, ViT-H, ViT-g, which a checkpoint does not tell
SIZES = {
    "vitl": EncoderConfig(256, embed_dim=1024, depth=24, num_heads=16, resize=292, **_LAYOUT),
    "vith": EncoderConfig(256, embed_dim=1280, depth=32, num_heads=16, resize=292, **_LAYOUT),
    "vitg": EncoderConfig(256, embed_dim=1408, depth=40, num_heads=22, mlp_ratio=6144 / 1408, resize=292, **_LAYOUT),
    "vitg-384": EncoderConfig(384, embed_dim=1408, depth=40, num_heads=22, mlp_ratio=6144 / 1408, resize=438, **_LAYOUT),
}
"""Meta's sizes. A picture's shorter side is resized to 256 / 224 of the crop, as their evaluation does."""
AC_ENCODER = replace(SIZES["vitg"], resize=256)
"""V-JEPA 2-AC's encoder sees the whole of a square picture."""
_OURS_TO_HF = {"patch_embed.proj": "embeddings.patch_embeddings.proj", "norm": "layernorm"}
_WEIGHTS = ("target_encoder", "encoder")  # of an original checkpoint, the one to take first: evaluations use the EMA


def save_encoder(path: str | Path, encoder: VideoEncoder, about: dict) -> None:
    """Write an encoder's weights as safetensors."""
    save_tensors(path, "encoder", encoder.state_dict(), encoder.metadata(), about)


def load_encoder(
    source: str | Path, expected: EncoderConfig | None = None, dtype: torch.dtype | None = None, heads: int | None = None
) -> Encoder:
    """A frozen encoder: of a file of ours (an encoder's or a whole model's), of Meta's weights, or of others by its name.

    source: encoder.safetensors, model.safetensors, a folder or repository (`owner/name`; extra `hub`) of a
    `VJEPA2Model`, an original checkpoint (*.pt), or efficientnet-lite0. Weights become `dtype` (None: as they are stored).
    `heads` is for original checkpoints of other widths than Meta's. Raises FileNotFoundError, or ValueError for a file
    that is damaged, lacks a tensor, has one too many or of another shape, or holds another config than the expected one.
    """
    path = Path(source)
    found = [name for name in ("encoder.safetensors", "model.safetensors") if (path / name).is_file()]
    if found and not (path / "config.json").exists():
        raise ValueError(f"{path} is a folder of a run: give the file, {path / found[0]}")
    if str(source) == EFFICIENTNET and expected is None:
        return EfficientNet()
    if path.suffix in (".pt", ".pth"):
        encoder = _from_checkpoint(path, dtype, heads)
    elif path.is_dir() or _is_repository(source):
        encoder = _from_folder(path if path.is_dir() else _downloaded(str(source)), dtype)
    else:
        encoder = _from_ours(path, dtype)
    if expected is not None and encoder.config != expected:
        raise ValueError(f"{path} is of another architecture: it holds {encoder.config}, expected {expected}")
    return encoder.requires_grad_(False).eval()


def load_ac(path: str | Path, dtype: torch.dtype | None = None, config: ACConfig = ACConfig(), heads: int | None = None) -> LatentModel:
    """V-JEPA 2-AC as a LatentModel, from its original checkpoint (`vjepa2-ac-vitg.pt`): encoder and predictor.

    Sizes but `config`'s grid, heads and scales are read off the file. Raises as `load_encoder` does.
    """
    state = _checkpoint(Path(path))
    if "predictor" not in state or "encoder" not in state:
        raise ValueError(f"{path} holds {', '.join(map(repr, state))}, expected 'encoder' and 'predictor' of V-JEPA 2-AC")
    image_size = config.grid[0] * _LAYOUT["patch_size"]
    encoder = _vision(_bare(state["encoder"]), path, dtype, heads, {"image_size": image_size, "resize": image_size})
    tensors = _bare(state["predictor"])
    depth = _depth(tensors, "predictor_blocks.")
    embed = _known(tensors, "predictor_embed.weight", 2, path)
    config = replace(config, feature_dim=embed.shape[1], embed_dim=embed.shape[0], depth=depth)
    predictor = _filled(lambda: ACPredictor(config), tensors, path, dtype)
    about = {"source": Path(path).name, "made_by": "Meta, V-JEPA 2-AC (arXiv 2506.09985)"}
    return LatentModel(encoder, predictor, None, about)


def load_any(source: str | Path, dtype: torch.dtype | None = None, heads: int | None = None) -> Encoder | LatentModel:
    """Whatever a source holds: a world model where there is one, else an encoder; random:SIZE makes one.

    Raises as `load_encoder` does.
    """
    path = Path(source)
    if str(source).startswith(RANDOM):
        return random_weights(str(source)[len(RANDOM) :], dtype)
    if path.suffix in (".pt", ".pth"):
        predicts = any("action_encoder" in name for name in _checkpoint(path).get("predictor", {}))
        return load_ac(path, dtype, heads=heads) if predicts else load_encoder(path, None, dtype, heads)
    if path.is_file() and path.suffix == ".safetensors" and read_header(path, "encoder", "model")[1].get("predictor"):
        made = model.load(path)
        if dtype not in (None, next(made.predictor.parameters()).dtype):
            raise ValueError(f"{path} is a whole model, which keeps the precision it was made with; leave out dtype, --bfloat16")
        return made
    return load_encoder(source, None, dtype, heads)


def random_weights(size: str, dtype: torch.dtype | None = None, seed: int = 0) -> nn.Module:
    """One of Meta's sizes with random weights, to see before a download what fits and how long it takes.

    size: one of SIZES, or vjepa2-ac-vitg, a LatentModel.
    """
    if size not in SIZES and size != f"{AC}-vitg":
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}, {AC}-vitg")
    encoder = _random(lambda: VideoEncoder(SIZES.get(size, AC_ENCODER)), dtype, seed)
    return encoder if size in SIZES else LatentModel(encoder, _random(ACPredictor, dtype, seed + 1), None, {"source": "random"})


def export(encoder: VideoEncoder, folder: str | Path) -> Path:
    """Write an encoder as a `VJEPA2Model` folder: config.json, model.safetensors, video_preprocessor_config.json.

    transformers loads it with equal outputs: VJEPA2Model.from_pretrained(folder), and `skip_predictor=True` where it is
    called, for there is no mask predictor inside. Raises ValueError for an encoder that the format cannot hold.
    """
    config, folder = encoder.config, Path(folder)
    fixed = {"views": 1, "absolute": False, "stem": 0, "rope_base": 10000.0, "rope_tiled": True}
    wrong = [f"{name} is {getattr(config, name)}, not {value}" for name, value in fixed.items() if getattr(config, name) != value]
    if wrong:
        raise ValueError(f"VJEPA2Model cannot hold this encoder: {'; '.join(wrong)}; pretrain one with --vjepa2-layout")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a new folder")
    tensors = {f"encoder.{name}": value.contiguous() for name, value in _to_hf(encoder.state_dict())}
    about = {
        "architectures": ["VJEPA2Model"], "model_type": "vjepa2", "crop_size": config.image_size, "patch_size": config.patch_size,
        "tubelet_size": config.tubelet_size, "hidden_size": config.embed_dim, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "mlp_ratio": config.mlp_ratio, "layer_norm_eps": 1e-6, "qkv_bias": True,
        "hidden_act": "gelu", "in_chans": 3, "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }  # fmt: skip
    pictures = {
        "video_processor_type": "VJEPA2VideoProcessor", "do_resize": bool(config.resize), "do_center_crop": bool(config.resize),
        "size": {"shortest_edge": config.resize or config.image_size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "crop_size": {"height": config.image_size, "width": config.image_size}, "do_normalize": True, "resample": 2,
        "image_mean": list(config.mean), "image_std": list(config.std),
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        made = Path(part, folder.name)
        made.mkdir()
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        (made / "video_preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")
        (made / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        made.rename(folder)  # whole or absent
    return folder


def _from_ours(path: Path, dtype: torch.dtype | None) -> Encoder:
    tensors, config, _ = load_tensors(path, "encoder", "model")
    if "encoder" in config:  # a model
        prefix, config = "encoder.", config["encoder"]
        tensors = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        encoder = build(config)
    except TypeError as error:
        raise ValueError(f"{path} is of another architecture: {error}") from error
    kept = {value.dtype for value in tensors.values() if value.is_floating_point()}
    fill(encoder, tensors, path)
    return encoder.to(dtype or (kept.pop() if len(kept) == 1 else torch.float32))


def _from_folder(folder: Path, dtype: torch.dtype | None) -> VideoEncoder:
    """Of a folder as transformers writes it."""
    config = _json(folder / "config.json")
    if config.get("model_type") != "vjepa2":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r}, expected 'vjepa2'")
    crop, pictures, width = config.get("crop_size", 256), _pictures(folder), config.get("hidden_size", 1024)
    sizes = EncoderConfig(
        crop, patch_size=config.get("patch_size", 16), tubelet_size=config.get("tubelet_size", 2),
        embed_dim=width, depth=config.get("num_hidden_layers", 24), num_heads=config.get("num_attention_heads", 16),
        mlp_ratio=int(width * config.get("mlp_ratio", 4.0)) / width, absolute=False, rope_base=10000.0,
        rope_tiled=True, **{"resize": crop * 256 // 224, **IMAGENET, **pictures},
    )  # fmt: skip
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model.safetensors in {folder}; download the repository's safetensors, not its pickles")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():
                    if not name.startswith(("predictor.", "pooler.", "classifier.")):
                        tensors[name.removeprefix("vjepa2.")] = stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download it again") from error
    return _filled(lambda: VideoEncoder(sizes), dict(_from_hf(tensors, sizes.depth)), folder, dtype)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); expected a folder of a VJEPA2Model") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected keys and values")
    return found


def _pictures(folder: Path) -> dict:
    """What a folder says is done to pictures, as fields of an EncoderConfig."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            told = _json(folder / name)
            size = told.get("size", 0)
            resize = size.get("shortest_edge", 0) if isinstance(size, dict) else int(size)
            resize = resize if told.get("do_resize", True) else 0
            named = {"mean": told.get("image_mean"), "std": told.get("image_std"), "resize": resize}
            return {key: value for key, value in named.items() if value is not None}
    return {}


def _from_hf(tensors: dict[str, Tensor], depth: int) -> Iterator[tuple[str, Tensor]]:
    """transformers' names and query, key, value as ours; what is not known keeps its name, and is refused by it."""
    tensors = {name.removeprefix("encoder."): value for name, value in tensors.items()}
    for ours, theirs in _OURS_TO_HF.items():
        for end in ("weight", "bias"):
            if f"{theirs}.{end}" in tensors:
                yield f"{ours}.{end}", tensors.pop(f"{theirs}.{end}")
    for i in range(depth):
        for end in ("weight", "bias"):
            names = [f"layer.{i}.attention.{part}.{end}" for part in ("query", "key", "value")]
            if all(name in tensors for name in names):
                yield f"blocks.{i}.attn.qkv.{end}", torch.cat([tensors.pop(name) for name in names])
    for name, value in tensors.items():
        yield name.replace("layer.", "blocks.", 1).replace(".attention.", ".attn."), value


def _to_hf(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        module, end = name.rsplit(".", 1)
        if module.endswith("attn.qkv"):
            layer = module.removesuffix("attn.qkv").replace("blocks.", "layer.", 1)
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                yield f"{layer}attention.{part}.{end}", piece
        else:
            yield f"{_OURS_TO_HF.get(module, module.replace('blocks.', 'layer.', 1).replace('.attn.', '.attention.'))}.{end}", value


def _from_checkpoint(path: Path, dtype: torch.dtype | None, heads: int | None) -> VideoEncoder:
    """Of an original checkpoint."""
    state = _checkpoint(path)
    found = next((name for name in _WEIGHTS if name in state), None)
    if found is None:
        raise ValueError(f"{path} holds {', '.join(map(repr, state))}, expected 'target_encoder' or 'encoder'")
    size = 384 if "384" in path.stem else 256
    return _vision(_bare(state[found]), path, dtype, heads, {"image_size": size, "resize": size * 256 // 224})


def _checkpoint(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; download it from https://github.com/facebookresearch/vjepa2")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle may fail in any way
        raise ValueError(f"{path} is not a whole PyTorch checkpoint of tensors ({type(error).__name__}); download it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dictionary with 'encoder'")
    for name in (*_WEIGHTS, "predictor"):
        inside = state.get(name, {})
        if not isinstance(inside, dict) or not all(isinstance(value, Tensor) for value in inside.values()):
            raise ValueError(f"{path}: {name} is a {type(inside).__name__}, expected tensors by their names")
    return state


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of training, and fixed positions, which rotary ones have replaced."""
    bare = {name.replace("module.", "").replace("backbone.", ""): value for name, value in tensors.items()}
    return {name: value for name, value in bare.items() if name not in ("pos_embed", "predictor_pos_embed")}


def _vision(tensors: dict[str, Tensor], path, dtype: torch.dtype | None, heads: int | None, pictures: dict) -> VideoEncoder:
    """An encoder in V-JEPA 2's layout whose sizes are those of its tensors."""
    kernel = _known(tensors, "patch_embed.proj.weight", 5, path)
    hidden = _known(tensors, "blocks.0.mlp.fc1.weight", 2, path)
    width, _, tube, patch, _ = kernel.shape
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"{path} is {width} wide, and does not tell its number of attention heads; give it as `heads`")
    sizes = EncoderConfig(
        tubelet_size=tube, embed_dim=width, depth=_depth(tensors, "blocks."), num_heads=heads,
        mlp_ratio=hidden.shape[0] / width, **{**_LAYOUT, "patch_size": patch, **pictures},
    )  # fmt: skip
    return _filled(lambda: VideoEncoder(sizes), tensors, path, dtype)


def _known(tensors: dict[str, Tensor], name: str, dims: int, path) -> Tensor:
    if name not in tensors or tensors[name].dim() != dims:
        have = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
        raise ValueError(f"{path} is of another architecture: {name} is {have}, expected a tensor of {dims} dimensions")
    return tensors[name]


def _depth(tensors: dict[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _filled(make: Callable[[], nn.Module], tensors: dict[str, Tensor], path, dtype: torch.dtype | None) -> nn.Module:
    """A module with these very tensors, which are in memory once."""
    with torch.device("meta"):
        module = make()
    kept = {name: value.to(dtype or value.dtype, copy=True) for name, value in tensors.items()}
    fill(module, kept, path, assign=True)
    return module.requires_grad_(False).eval()


def _random(make: Callable[[], nn.Module], dtype: torch.dtype | None, seed: int) -> nn.Module:
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype or before)
            return make().requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)


def _is_repository(source: str | Path) -> bool:
    parts = str(source).split("/")
    return isinstance(source, str) and len(parts) == 2 and all(parts) and "." not in parts[0] and not Path(source).suffix


def _downloaded(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"no folder {repository}; to download it, pip install -c constraints.txt -e '.[hub]' in this project's folder") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the network, or of the name
        raise ValueError(f"cannot download {repository} ({type(error).__name__}: {error})") from error
