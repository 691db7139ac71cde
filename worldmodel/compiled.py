"""Imagination as one graph that OpenVINO compiles for the processor: an `Imaginer`'s step in two thirds of its time or less.

Of few candidates torch spends its time on calling a hundred operators for each imagined step, of many on moving what lies between
two products. OpenVINO fuses these, and a rollout is one call. It is used wherever it is installed (the extra `fast`), and says the same
as `Predictor.forward` and `Imaginer`, in bfloat16 within its precision: whoever changes the step there changes it here.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.imaginer import halved, halves_of, turning, twin
from worldmodel.interface import Features
from worldmodel.latent import LOG_STD, SQUEEZED
from worldmodel.predictor import Cache, Predictor, merged, turns

KEPT = 32  # graphs at most, of 20 to 80 MB
MASKED = -1e4  # added to the scores of frames that are not there


@functools.cache
def library():
    """OpenVINO, or None where it is not installed, or ATEN_CPU_CAPABILITY says which instructions to use, which it does not heed."""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        return None
    quiet = sys.modules.setdefault("openvino_telemetry", None) is None  # else its import forks this process, which tells others of it
    try:
        import openvino
        import openvino.opset13
    except ImportError as error:
        if error.name != "openvino":
            logging.getLogger(__name__).warning("OpenVINO is installed, but cannot be used (%s): pip install 'openvino>=2025.1'", error)
        return None
    finally:
        if quiet:
            del sys.modules["openvino_telemetry"]
    return openvino


@functools.cache
def core():
    """What compiles, once for the life of a process.

    It gives its thread a stack for signals and takes it away when it goes, out of turn where several come and go: Ctrl-C would end in a
    segmentation fault. `openvino.compile_model` makes one for each graph.
    """
    return library().Core()


class CompiledImaginer:
    """Imagines what an `Imaginer` does, on the processor, by graphs that are compiled when they are first needed, each in half a second.

    One problem's rollouts have a graph of their own for each number of courses and steps, since fixed shapes are faster; those of
    several problems share one for each number of steps. Those asked for last are kept.
    """

    @staticmethod
    def fits(predictor: nn.Module) -> bool:
        """Whether it can imagine for this predictor, here."""
        plain = isinstance(predictor, Predictor) and not predictor.config.codes
        return plain and predictor.place.device.type == "cpu" and predictor.place.dtype == torch.float32 and library() is not None

    def __init__(self, predictor: Predictor, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.graph = predictor.config, dtype, Graph(predictor)
        self.predictor = twin(predictor, dtype)  # for what has been seen, all frames of that at once
        self._compiled: dict[tuple[int, ...], Request] = {}
        self._alone = threading.Lock()

    def laid(self, cache: Cache | None) -> tuple[np.ndarray, np.ndarray]:
        """What is cached of past frames, as the graph reads it.

        -> keys and values [depth, 2, B or 1, heads, (window - 1) * L, head_dim], the last frame's last, and [1, 1, 1, (window - 1) * L]
        to add to the scores, which masks what is not there.
        """
        config, length = self.config, (self.config.window - 1) * self.predictor.tokens
        halves = halves_of(config)
        past = torch.zeros(config.depth, 2, len(cache[0][0]) if cache else 1, config.num_heads, length, len(halves))
        mask = torch.full((1, 1, 1, length), MASKED)
        for own, (keys, values) in zip(past, cache or ()):
            known = slice(length - keys.shape[2], None)
            own[0, :, :, known], own[1, :, :, known], mask[..., known] = keys[..., halves], values, 0.0
        return past.numpy(), mask.numpy()

    @torch.no_grad()
    def rollout(self, now: Features, past: tuple[np.ndarray, np.ndarray], start: int, actions: Tensor, noise: Tensor) -> Features:
        """As `Imaginer.rollout`; the past as it is `laid`. Raises RuntimeError where OpenVINO cannot compile it."""
        (b, m, horizon), predictor = actions.shape[:3], self.predictor
        # Each step's turns apart: if the graph split them it would round them to bfloat16 first, but not those of a single step.
        turn = (x for h in range(horizon) for x in halved(turns(self.config, start + h, 1, torch.float32, actions.device)))
        given = (now.patches, predictor.normalise(now.proprio), actions, noise, *turn)
        inputs = [x.float().contiguous().numpy() for x in given]
        if self.config.window > 1:
            frames, mask = past
            inputs += [frames if frames.shape[2] == b else frames.repeat(b, 2), mask]
        rows = (1, m) if b == 1 else (-1, -1)
        patches, proprio = map(torch.from_numpy, self._request(*rows, horizon, torch.get_num_threads())(inputs))
        return Features(patches, proprio * predictor.proprio_std + predictor.proprio_mean).map(lambda x: x.unflatten(0, (b, m)))

    def _request(self, b: int, m: int, horizon: int, threads: int) -> Request:
        """What infers rollouts of b problems under m courses, -1 for any number of them."""
        key = b, m, horizon, threads
        with self._alone:
            found = self._compiled.pop(key, None) or Request(lambda: self.graph.built(b, m, horizon), self.dtype, threads)
            self._compiled[key] = found
            if len(self._compiled) > KEPT:
                del self._compiled[next(iter(self._compiled))]
        return found


class Request:
    """A compiled model that infers one thing at a time."""

    def __init__(self, build: Callable, dtype: torch.dtype, threads: int) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32", "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads, "ENABLE_HYPER_THREADING": True, "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        try:
            self._request = core().compile_model(build(), "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise RuntimeError(
                f"OpenVINO {library().__version__} cannot compile this model; without it torch imagines: pip uninstall openvino, or set "
                f"model.compiled = False. It says: {error}"
            ) from error
        self._alone = threading.Lock()

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """What it makes of float32 inputs, in arrays of their own."""
        with self._alone:
            return list(self._request.infer(inputs, share_inputs=True).values())


class Graph:
    """A predictor's imagination in OpenVINO's nodes: R rows, one for each course of each problem.

    Patches stay merged in squares to the end; weights of what reads single patches are brought into the squares' order instead.
    """

    @torch.no_grad()
    def __init__(self, predictor: Predictor) -> None:
        p, config = predictor, predictor.config
        self.ops, self.config, self.eps = library().opset13, config, p.norm.eps
        self.patches, self.tokens = p.patches, p.tokens
        order = merged(torch.arange(p.patches)[None, None, :, None], config.grid, config.merge).flatten()
        near, far = p.prior.hidden.weight.split((SQUEEZED * p.patches, config.proprio_dim + config.action_dim), 1)
        near = near.unflatten(1, (p.patches, SQUEEZED))[:, order].flatten(1)
        rest = p.blocks[0].rest.expand(-1, config.embed_dim).flatten()
        self.squeeze, self.latent = self._map(p.prior.squeeze), self._map(p.prior.out)
        self.prior = self._linear(torch.cat((near, far), 1), p.prior.hidden.bias)
        self.embed, self.place, self.feel = self._map(p.embed), self._constant(p.place[None]), self._map(p.proprio_embed)
        self.condition = self._map(p.condition[0]), self._map(p.condition[2])
        said = ((b.modulate.weight, b.modulate.bias + rest) for b in p.blocks)
        self.modulate = self._linear(*(torch.cat(parts) for parts in zip(*said)))
        self.blocks = [
            (self._linear(*turning(b.attn.qkv, config)), *map(self._map, (b.attn.proj, b.mlp.fc1, b.mlp.fc2))) for b in p.blocks
        ]
        self.scale, self.shift = self._constant(p.norm.weight), self._constant(p.norm.bias)
        self.to_features, self.to_proprio = self._map(p.to_features), self._map(p.to_proprio)

    def built(self, b: int, m: int, horizon: int):
        """The model of what is imagined of b problems under m courses, -1 for any number of them.

        From patches [B, P, D], proprio [B, S] normalised, actions [B, M, H, A], noise [B, M, H, Z], cosines and sines [1, 1, L, head_dim / 2]
        of each step, and, for a window of several frames, what is `laid`. To patches [R, H, P, D] and proprio [R, H, S] normalised.
        """
        ops, config, tokens, shown, felt = self.ops, self.config, self.tokens, [], []
        before, side, feature, head = config.window - 1, config.merge, config.feature_dim, config.embed_dim // config.num_heads
        (rows, columns), square = (n // side for n in config.grid), side * side * feature
        sizes = [
            (b, self.patches, feature), (b, config.proprio_dim), (b, m, horizon, config.action_dim), (b, m, horizon, config.latent_dim),
            *2 * horizon * [(1, 1, tokens, head // 2)],
        ]  # fmt: skip
        sizes += [(config.depth, 2, b, config.num_heads, before * tokens, head), (1, 1, 1, before * tokens)] if before else []
        inputs = [ops.parameter(list(size), np.float32) for size in sizes]
        (patches, proprio, actions, noise), turn, past = inputs[:4], inputs[4 : 4 + 2 * horizon], inputs[4 + 2 * horizon :]
        times = ops.gather(ops.shape_of(actions), np.array([1]), np.array(0))

        def repeated(x, *size: int):
            """Rows [B, *size], each for all its courses: [R, *size]."""
            wanted = ops.concat([np.array([1]), times, np.ones(len(size), np.int64)], 0)
            return self._shaped(ops.broadcast(ops.unsqueeze(x, np.array(1)), wanted, broadcast_spec="BIDIRECTIONAL"), -1, *size)

        squares = ops.transpose(self._shaped(patches, -1, rows, side, columns, side, feature), np.array([0, 1, 3, 2, 4, 5]))
        squares = self._shaped(squares, -1, tokens - 1, square)  # [B, P / merge^2, merge^2 * D], from the first step on [R, ...]
        proprio = repeated(proprio, config.proprio_dim)  # [R, S]
        actions = self._split(self._shaped(actions, -1, horizon, config.action_dim), 1, horizon)
        noise = self._split(self._shaped(noise, -1, horizon, config.latent_dim), 1, horizon)
        known, mask = self._known(*past, repeated) if before else ([([], [])] * config.depth, [])
        for h in range(horizon):
            small = self.squeeze(self._shaped(squares, -1, tokens - 1, side * side, feature))
            small = self._shaped(small, -1, SQUEEZED * self.patches)  # [B or R, 8 * P]
            seen = ops.add(self.embed(squares), self.place)  # [B or R, L - 1, dim]
            if not h:
                small, seen = repeated(small, SQUEEZED * self.patches), repeated(seen, tokens - 1, config.embed_dim)
                squares = repeated(squares, tokens - 1, square)
            action, drawn = self._shaped(actions[h], -1, config.action_dim), self._shaped(noise[h], -1, config.latent_dim)
            modulations = self._modulations(small, proprio, action, drawn)
            there = ops.concat([*mask[h:], np.zeros((1, 1, 1, (h + 1) * tokens), np.float32)], 3) if mask[h:] else None
            x = ops.concat([self._shaped(self.feel(proprio), -1, 1, config.embed_dim), seen], 1)  # [R, L, dim]
            for i, modulation in enumerate(modulations):
                x, known[i] = self._block(self.blocks[i], x, modulation, turn[2 * h : 2 * h + 2], known[i], there)
            x = ops.add(ops.multiply(self._norm(x), self.scale), self.shift)
            first, others = ops.variadic_split(x, np.array(1), np.array([1, tokens - 1])).outputs()
            told, now = self.to_features(others), self._shaped(squares, -1, tokens - 1, side * side, feature)
            if config.gated:
                told, stays = ops.variadic_split(told, np.array(2), np.array([square, side * side])).outputs()
                now = ops.multiply(now, self._shaped(ops.add(stays, np.ones(1, np.float32)), -1, tokens - 1, side * side, 1))
            changed = ops.add(self._shaped(told, -1, tokens - 1, side * side, feature), now)
            squares = self._shaped(self._norm(changed, 1e-5), -1, tokens - 1, square)  # torch's eps where none is given
            proprio = ops.add(proprio, self._shaped(self.to_proprio(first), -1, config.proprio_dim))
            shown.append(self._shaped(squares, -1, 1, rows, columns, side, side, feature))
            felt.append(self._shaped(proprio, -1, 1, config.proprio_dim))
        patches = ops.transpose(ops.concat(shown, 1), np.array([0, 1, 2, 4, 3, 5, 6]))  # [R, H, rows, side, columns, side, D]
        patches = self._shaped(patches, -1, horizon, self.patches, feature)
        return library().Model([patches, ops.concat(felt, 1)], inputs, "rollout")

    def _modulations(self, small, proprio, action, noise):
        """Shifts, scales and gates [R, 1, dim] of each block, [depth][6], after a z that the prior makes of noise [R, Z]."""
        ops, config = self.ops, self.config
        mean, log_std = self._split(self.latent(ops.gelu(self.prior(ops.concat([small, proprio, action], 1)), "erf")), 1, 2)
        z = ops.add(mean, ops.multiply(ops.exp(ops.clamp(log_std, *LOG_STD)), noise))
        condition = self.condition[1](ops.swish(self.condition[0](ops.concat([action, proprio, z], 1))))
        said = self._shaped(self.modulate(ops.swish(condition)), -1, 1, 6 * config.depth * config.embed_dim)
        return np.reshape(self._split(said, 2, 6 * config.depth), (config.depth, 6))

    def _known(self, past, mask, repeated: Callable):
        """Of each block keys and values, each [R, heads, L, head_dim], of each frame before; and the mask of each frame."""
        config, tokens, known = self.config, self.tokens, []
        before, head = config.window - 1, config.embed_dim // config.num_heads
        for own in self._split(past, 0, config.depth):
            both = (self._shaped(x, -1, config.num_heads, before * tokens, head) for x in self._split(own, 1, 2))
            known.append(tuple(self._split(repeated(x, config.num_heads, before * tokens, head), 2, before) for x in both))
        return known, self._split(mask, 3, before)

    def _block(self, maps, x, modulation, turn, known, mask):
        """One block over the tokens x [R, L, dim] of a frame -> the same, and keys and values of the frames that the next one may see."""
        ops, config, tokens, heads = self.ops, self.config, self.tokens, self.config.num_heads
        (qkv, project, widen, narrow), (shift1, scale1, gate1, shift2, scale2, gate2), (cos, sin) = maps, modulation, turn
        y = qkv(ops.add(ops.multiply(self._norm(x), scale1), shift1))
        y = ops.transpose(self._shaped(y, -1, tokens, 3 * heads, config.embed_dim // heads), np.array([0, 2, 1, 3]))
        both, value = ops.variadic_split(y, np.array(1), np.array([2 * heads, heads])).outputs()
        low, high = self._split(both, 3, 2)
        low, high = ops.subtract(ops.multiply(low, cos), ops.multiply(high, sin)), ops.add(ops.multiply(high, cos), ops.multiply(low, sin))
        query, key = self._split(ops.concat([low, high], 3), 1, 2)  # [R, heads, L, head_dim]
        known = tuple([*frames, new][-config.window :] for frames, new in zip(known, (key, value)))
        keys, values = (ops.concat(frames, 2) if len(frames) > 1 else frames[0] for frames in known)
        scores = ops.matmul(query, keys, False, True)
        y = ops.matmul(ops.softmax(scores if mask is None else ops.add(scores, mask), 3), values, False, False)
        y = self._shaped(ops.transpose(y, np.array([0, 2, 1, 3])), -1, tokens, config.embed_dim)
        x = ops.add(x, ops.multiply(project(y), gate1))
        y = narrow(ops.gelu(widen(ops.add(ops.multiply(self._norm(x), scale2), shift2)), "erf"))
        return ops.add(x, ops.multiply(y, gate2)), known

    def _linear(self, weight: Tensor, bias: Tensor) -> Callable:
        """A linear map of these; all that it maps shares them."""
        ops, weight, bias = self.ops, self._constant(weight), self._constant(bias)
        return lambda x: ops.add(ops.matmul(x, weight, False, True), bias)

    def _map(self, linear: nn.Linear | nn.Sequential) -> Callable:
        """A linear map, or two with GELU between them."""
        if isinstance(linear, nn.Sequential):
            first, last = self._map(linear[0]), self._map(linear[-1])
            return lambda x: last(self.ops.gelu(first(x), "erf"))
        return self._linear(linear.weight, linear.bias)

    def _constant(self, x: Tensor):
        return self.ops.constant(x.detach().float().contiguous().numpy())

    def _norm(self, x, eps: float | None = None):
        return self.ops.mvn(x, np.array([-1]), True, self.eps if eps is None else eps, "inside_sqrt")

    def _shaped(self, x, *size: int):
        return self.ops.reshape(x, np.array(size), False)

    def _split(self, x, axis: int, count: int) -> list:
        return self.ops.split(x, np.array(axis), count).outputs()
