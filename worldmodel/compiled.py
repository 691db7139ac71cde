"""Imagination as one graph that OpenVINO compiles for the processor: the numbers of an `Imaginer`, in about half of its time.

Of few candidates torch spends its time on calling a hundred operators for each imagined step, of many on moving what lies between
two products. OpenVINO fuses these, and a rollout is one call. Used wherever it is installed (the extra `fast`).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.imaginer import halved, halves_of, turning, twin
from worldmodel.interface import Features
from worldmodel.predictor import Cache, Predictor, merged, turns

FEW = 64  # candidates of one problem, of which each number gets a graph of its own: in fixed shapes it is faster, and compiled in half a second
HIDDEN = -1e4  # added to the scores of frames that are not there


@functools.cache
def library():
    """OpenVINO, or None where it is not installed."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # so it is here, or as ATEN_CPU_CAPABILITY asks for, which OpenVINO does not read
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    try:
        import openvino
        import openvino.opset13
    except ImportError:
        return None
    return openvino


class CompiledImaginer:
    """Imagines what an `Imaginer` does, on the processor, by graphs that are compiled when they are first needed."""

    @staticmethod
    def fits(predictor: nn.Module) -> bool:
        """Whether it can imagine for this predictor, here."""
        plain = isinstance(predictor, Predictor) and not predictor.config.codes
        return plain and predictor.place.device.type == "cpu" and predictor.place.dtype == torch.float32 and library() is not None

    @torch.no_grad()
    def __init__(self, predictor: Predictor, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.graph = predictor.config, dtype, Graph(predictor)
        self.predictor = twin(predictor, dtype)  # for what has been seen, all frames of that at once
        self._compiled: dict[tuple[int, ...], object] = {}
        self._alone = threading.Lock()

    def laid(self, cache: Cache | None) -> tuple[np.ndarray, np.ndarray]:
        """What is cached of past frames, as the graph reads it.

        -> keys and values [depth, 2, B or 1, heads, (window - 1) * L, head_dim], the last frame's last, and [1, 1, 1, (window - 1) * L]
        to add to the scores, which hides what is not there.
        """
        config, length = self.config, (self.config.window - 1) * self.predictor.tokens
        halves = halves_of(config)
        past = torch.zeros(config.depth, 2, len(cache[0][0]) if cache else 1, config.num_heads, length, len(halves))
        hide = torch.full((1, 1, 1, length), HIDDEN)
        for own, (keys, values) in zip(past, cache or ()):
            known = slice(length - keys.shape[2], None)
            own[0, :, :, known], own[1, :, :, known], hide[..., known] = keys[..., halves], values, 0.0
        return past.numpy(), hide.numpy()

    @torch.no_grad()
    def rollout(self, now: Features, past: tuple[np.ndarray, np.ndarray], start: int, actions: Tensor, noise: Tensor) -> Features:
        """As `Imaginer.rollout`; the past as it is `laid`."""
        (b, m, horizon), predictor = actions.shape[:3], self.predictor
        turn = (x for h in range(horizon) for x in halved(turns(self.config, start + h, 1, torch.float32, actions.device)))
        given = (now.patches, predictor.normalise(now.proprio), actions, noise, *turn)
        inputs = [x.float().contiguous().numpy() for x in given]
        if self.config.window > 1:
            frames, hide = past
            inputs += [np.ascontiguousarray(np.broadcast_to(frames, (*frames.shape[:2], b, *frames.shape[3:]))), hide]
        fixed = b == 1 and m <= FEW
        with self._alone:
            request = self._request(*((b, m) if fixed else (-1, -1)), horizon, torch.get_num_threads())
            patches, proprio = (torch.from_numpy(x) for x in request.infer(inputs, share_inputs=True).values())
        return Features(patches, proprio * predictor.proprio_std + predictor.proprio_mean).map(lambda x: x.unflatten(0, (b, m)))

    def _request(self, b: int, m: int, horizon: int, threads: int):
        """What infers rollouts of b problems under m courses, -1 for any number of them."""
        key = b, m, horizon, threads
        if key not in self._compiled:
            settings = {
                "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == torch.bfloat16 else "f32", "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads, "ENABLE_HYPER_THREADING": True, "ENABLE_CPU_PINNING": False,
            }  # fmt: skip
            self._compiled[key] = library().compile_model(self.graph.rollout(b, m, horizon), "CPU", settings).create_infer_request()
        return self._compiled[key]


class Graph:
    """A predictor's imagination as nodes of OpenVINO's: R rows, one for each course of each problem."""

    @torch.no_grad()
    def __init__(self, predictor: Predictor) -> None:
        p, config = predictor, predictor.config
        self.ops, self.config, self.size = library().opset13, config, predictor.tokens
        order = merged(torch.arange(p.patches)[None, None, :, None], config.grid, config.merge).flatten()  # of patches in squares
        near, far = p.prior.hidden.weight.split((8 * p.patches, config.proprio_dim + config.action_dim), 1)
        near = near.unflatten(1, (p.patches, 8))[:, order].flatten(1)
        rest = p.blocks[0].rest.expand(-1, config.embed_dim).flatten()
        self.squeeze, self.latent = self._map(p.prior.squeeze), self._map(p.prior.out)
        self.hidden = self._linear(torch.cat((near, far), 1), p.prior.hidden.bias)
        self.embed, self.place, self.feel = self._map(p.embed), self._constant(p.place[None]), self._map(p.proprio_embed)
        self.condition = self._map(p.condition[0]), self._map(p.condition[2])
        said = ((b.modulate.weight, b.modulate.bias + rest) for b in p.blocks)
        self.modulate = self._linear(*(torch.cat(parts) for parts in zip(*said)))
        self.blocks = [
            (self._linear(*turning(b.attn.qkv, config)), *map(self._map, (b.attn.proj, b.mlp.fc1, b.mlp.fc2))) for b in p.blocks
        ]
        self.scale, self.shift = self._constant(p.norm.weight), self._constant(p.norm.bias)
        self.to_features, self.to_proprio = self._map(p.to_features), self._map(p.to_proprio)

    def rollout(self, b: int, m: int, horizon: int):
        """All that is imagined of b problems under m courses, -1 for any number of them.

        From patches [B, P, D], proprio [B, S] normalised, actions [B, M, H, A], noise [B, M, H, Z], cosines and sines [1, 1, L, head_dim / 2]
        of each step, and, for a window of several frames, what is `laid`. To patches [R, H, P, D] and proprio [R, H, S] normalised.
        """
        ops, config, tokens, shown, felt = self.ops, self.config, self.size, [], []
        before, side, head = config.window - 1, config.merge, config.embed_dim // config.num_heads
        (rows, columns), wide = (n // side for n in config.grid), side * side * config.feature_dim
        sizes = [
            (b, rows * side * columns * side, config.feature_dim), (b, config.proprio_dim), (b, m, horizon, config.action_dim),
            (b, m, horizon, config.latent_dim), *2 * horizon * [(1, 1, tokens, head // 2)],
        ]  # fmt: skip
        sizes += [(config.depth, 2, b, config.num_heads, before * tokens, head), (1, 1, 1, before * tokens)] if before else []
        inputs = [ops.parameter(list(size), np.float32) for size in sizes]
        (patches, proprio, actions, noise), turn, past = inputs[:4], inputs[4 : 4 + 2 * horizon], inputs[4 + 2 * horizon :]
        times = ops.gather(ops.shape_of(actions), np.array([1]), np.array(0))

        def repeated(x, *size: int):
            """Rows [B, *size], each for all its courses: [R, *size]."""
            wanted = ops.concat([np.array([1]), times, np.ones(len(size), np.int64)], 0)
            return self._shaped(ops.broadcast(ops.unsqueeze(x, np.array(1)), wanted, broadcast_spec="BIDIRECTIONAL"), -1, *size)

        squares = ops.transpose(self._shaped(patches, -1, rows, side, columns, side, config.feature_dim), np.array([0, 1, 3, 2, 4, 5]))
        squares, proprio = self._shaped(squares, -1, rows * columns, wide), repeated(proprio, config.proprio_dim)
        actions = self._split(self._shaped(actions, -1, horizon, config.action_dim), 1, horizon)
        noise = self._split(self._shaped(noise, -1, horizon, config.latent_dim), 1, horizon)
        known, hide = self._known(*past, repeated) if before else ([([], []) for _ in self.blocks], [])
        for h in range(horizon):
            small = self.squeeze(self._shaped(squares, -1, tokens - 1, side * side, config.feature_dim))
            small = self._shaped(small, -1, 8 * (tokens - 1) * side * side)
            seen = ops.add(self.embed(squares), self.place)
            if not h:  # from then on each course has squares of its own
                small, seen = repeated(small, 8 * (tokens - 1) * side * side), repeated(seen, tokens - 1, config.embed_dim)
                squares = repeated(squares, tokens - 1, wide)
            action, drawn = self._shaped(actions[h], -1, config.action_dim), self._shaped(noise[h], -1, config.latent_dim)
            modulations = self._modulations(small, proprio, action, drawn)
            hidden = ops.concat([*hide[h:], np.zeros((1, 1, 1, (h + 1) * tokens), np.float32)], 3) if hide[h:] else None
            x = ops.concat([self._shaped(self.feel(proprio), -1, 1, config.embed_dim), seen], 1)
            for i, modulation in enumerate(modulations):
                x = self._block(i, x, modulation, turn[2 * h : 2 * h + 2], known[i], hidden)
            x = ops.add(ops.multiply(self._norm(x), self.scale), self.shift)
            first, others = ops.variadic_split(x, np.array(1), np.array([1, tokens - 1])).outputs()
            change = self._shaped(ops.add(self.to_features(others), squares), -1, tokens - 1, side * side, config.feature_dim)
            squares = self._shaped(self._norm(change, 1e-5), -1, tokens - 1, wide)
            proprio = ops.add(proprio, self._shaped(self.to_proprio(first), -1, config.proprio_dim))
            shown.append(self._shaped(squares, -1, 1, rows, columns, side, side, config.feature_dim))
            felt.append(self._shaped(proprio, -1, 1, config.proprio_dim))
        patches = ops.transpose(ops.concat(shown, 1), np.array([0, 1, 2, 4, 3, 5, 6]))
        patches = self._shaped(patches, -1, horizon, rows * side * columns * side, config.feature_dim)
        return library().Model([patches, ops.concat(felt, 1)], inputs, "rollout")

    def _modulations(self, small, proprio, action, noise):
        """Shifts, scales and gates [R, 1, dim] of each block, [depth][6], after a z that the prior makes of noise [R, Z]."""
        ops, config = self.ops, self.config
        hidden = ops.gelu(self.hidden(ops.concat([small, proprio, action], 1)), "erf")
        mean, log_std = self._split(self.latent(hidden), 1, 2)
        z = ops.add(mean, ops.multiply(ops.exp(ops.clamp(log_std, -4.0, 2.0)), noise))
        condition = self.condition[1](ops.swish(self.condition[0](ops.concat([action, proprio, z], 1))))
        said = self._shaped(self.modulate(ops.swish(condition)), -1, 1, 6 * config.depth * config.embed_dim)
        return np.reshape(self._split(said, 2, 6 * config.depth), (config.depth, 6))

    def _known(self, past, hide, repeated: Callable):
        """Of each block keys and values [R, heads, L, head_dim] of each frame before, and of each frame what hides it."""
        config, size, known = self.config, self.size, []
        before, head = config.window - 1, config.embed_dim // config.num_heads
        for own in self._split(past, 0, config.depth):
            both = (self._shaped(x, -1, config.num_heads, before * size, head) for x in self._split(own, 1, 2))
            known.append(tuple(self._split(repeated(x, config.num_heads, before * size, head), 2, before) for x in both))
        return known, self._split(hide, 3, before)

    def _block(self, i: int, x, modulation, turn, known, hide):
        """One block over the tokens x [R, L, dim] of a frame; its keys and values are added to those known."""
        ops, config, size = self.ops, self.config, self.size
        (qkv, project, widen, narrow), (shift1, scale1, gate1, shift2, scale2, gate2), heads = self.blocks[i], modulation, config.num_heads
        y = qkv(ops.add(ops.multiply(self._norm(x), scale1), shift1))
        y = ops.transpose(self._shaped(y, -1, size, 3 * heads, config.embed_dim // heads), np.array([0, 2, 1, 3]))
        both, value = ops.variadic_split(y, np.array(1), np.array([2 * heads, heads])).outputs()
        (low, high), (cos, sin) = self._split(both, 3, 2), turn
        low, high = ops.subtract(ops.multiply(low, cos), ops.multiply(high, sin)), ops.add(ops.multiply(high, cos), ops.multiply(low, sin))
        query, key = self._split(ops.concat([low, high], 3), 1, 2)
        for frames, new in zip(known, (key, value)):
            frames.append(new)
            del frames[: -config.window]
        keys, values = (ops.concat(frames, 2) if len(frames) > 1 else frames[0] for frames in known)
        scores = ops.matmul(query, keys, False, True)
        y = ops.matmul(ops.softmax(scores if hide is None else ops.add(scores, hide), 3), values, False, False)
        y = self._shaped(ops.transpose(y, np.array([0, 2, 1, 3])), -1, size, config.embed_dim)
        x = ops.add(x, ops.multiply(project(y), gate1))
        y = narrow(ops.gelu(widen(ops.add(ops.multiply(self._norm(x), scale2), shift2)), "erf"))
        return ops.add(x, ops.multiply(y, gate2))

    def _linear(self, weight: Tensor, bias: Tensor) -> Callable:
        """A linear map of these; what is mapped twice shares them."""
        weight, bias = self._constant(weight), self._constant(bias)
        return lambda x: self.ops.add(self.ops.matmul(x, weight, False, True), bias)

    def _map(self, linear: nn.Linear) -> Callable:
        return self._linear(linear.weight, linear.bias)

    def _constant(self, x: Tensor):
        return self.ops.constant(x.detach().float().contiguous().numpy().copy())

    def _norm(self, x, eps: float = 1e-6):
        return self.ops.mvn(x, np.array([-1]), True, eps, "inside_sqrt")

    def _shaped(self, x, *size: int):
        return self.ops.reshape(x, np.array(size), False)

    def _split(self, x, axis: int, count: int) -> list:
        return self.ops.split(x, np.array(axis), count).outputs()
