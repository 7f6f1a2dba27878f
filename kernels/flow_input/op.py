"""Checks, schemas, fakes, autograd and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import PhiloxNoise, check_noise, given_or_drawn, noise_arguments
from reca.kernels.flow_input import reference

_NAME = "flow_input"
_MAX_DIM = 256


def _noised(
    clean: Tensor,
    time: Tensor,
    images: Tensor,
    noise: Tensor | None,
    samples: Tensor | None,
    rows: Tensor | None,
    step: Tensor | None,
    key: int,
    dtype: torch.dtype,
) -> Tensor:
    drawn = given_or_drawn(noise, samples, rows, step, key, images, clean.shape[1])
    return reference.noised(clean, drawn, time, images, dtype)


def _cpu(clean: Tensor, time: Tensor, images: Tensor, *arguments: Any) -> Tensor:
    *drawn, weight, bias, time_embedding, position, position_ids = arguments
    noised = _noised(*(clean, time, images, *drawn, weight.dtype))
    return reference.embed(noised, images, weight, bias, time_embedding, position, position_ids)


def _cuda(*arguments: Any) -> Tensor:
    from reca.kernels.flow_input import kernel

    return kernel.forward(*arguments)


def _fake(clean: Tensor, time: Tensor, images: Tensor, *arguments: Any) -> Tensor:
    weight: Tensor = arguments[5]
    return weight.new_empty(clean.shape[0], weight.shape[0])


def _features_cpu(clean: Tensor, time: Tensor, images: Tensor, *arguments: Any) -> Tensor:
    return reference.features(_noised(clean, time, images, *arguments), images, time.shape[0])


def _features_cuda(*arguments: Any) -> Tensor:
    from reca.kernels.flow_input import kernel

    return kernel.features(*arguments)


def _features_fake(clean: Tensor, time: Tensor, images: Tensor, *arguments: Any) -> Tensor:
    width = reference.features_width(clean.shape[1], time.shape[0])
    return clean.new_empty(clean.shape[0], width, dtype=arguments[-1])


_LATENTS = (
    "Tensor clean, Tensor time, Tensor images, Tensor? noise, Tensor? samples, Tensor? rows, Tensor? step,"
    " int key"
)
_forward = define_op(
    f"{_NAME}({_LATENTS}, Tensor weight, Tensor? bias, Tensor? time_embedding, Tensor? position,"
    " Tensor? position_ids) -> Tensor embedded",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_features = define_op(
    f"{_NAME}_features({_LATENTS}, ScalarType dtype) -> Tensor features",
    cpu=_features_cpu,
    cuda=_features_cuda,
    fake=_features_fake,
)


@register_flop_formula(torch.ops.reca.flow_input)
def _flops(clean_shape: Any, *others: Any, **named: Any) -> int:
    weight_shape = others[7]
    return int(2 * clean_shape[0] * clean_shape[1] * weight_shape[0])


class _FlowInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Any, time_embedding: Any, *others: Any) -> Tensor:
        *latents, position, position_ids = others
        clean, time, images, noise, samples, rows, step, key = latents
        ctx.key, ctx.shape = key, weight.shape
        ctx.save_for_backward(clean, time, images, noise, samples, rows, step)
        embedded: Tensor = _forward(*latents, weight, bias, time_embedding, position, position_ids)
        return embedded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_embedded: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: recomputation allows no second time
        dim, num_images = ctx.shape[1], saved[1].shape[0]
        features = _features(*saved, ctx.key, d_embedded.dtype)
        with torch.autocast(d_embedded.device.type, enabled=False):
            # One product reads the large gradient once for all three.
            products = d_embedded.t() @ features  # [width, features]
        gradients = (
            products[:, :dim].contiguous(),
            products[:, dim].contiguous(),
            products[:, dim + 1 : dim + 1 + num_images].t().contiguous(),
        )
        needed = ctx.needs_input_grad
        return (*(g if need else None for g, need in zip(gradients, needed, strict=False)), *[None] * 10)


def _check(clean: Tensor, noise: Tensor | PhiloxNoise, time: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The latents, by name."""
    if clean.dim() != 2 or not 0 < clean.shape[1] <= _MAX_DIM:
        raise ValueError(
            f"{_NAME}: clean must be [tokens, 1 to {_MAX_DIM}], got {list(clean.shape)}; flatten [B, T, D]"
        )
    if time.dim() != 1 or time.shape[0] == 0:
        raise ValueError(f"{_NAME}: time must be [images > 0], got {list(time.shape)}; one per image")
    check_shape(_NAME, "images", images, (clean.shape[0],), "the image of each token")
    check_dtype(_NAME, "clean", clean, FLOATS)
    check_dtype(_NAME, "time", time, (torch.float32,))
    check_dtype(_NAME, "images", images, (torch.int64,))
    return {"clean": clean, "time": time, "images": images} | check_noise(
        _NAME, noise, clean.shape[0], clean.shape[1], time.shape[0]
    )


def flow_input(
    clean: Tensor,
    noise: Tensor | PhiloxNoise,
    time: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    time_embedding: Tensor | None = None,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Noised latents, their projection, and the embeddings of time and position, in one pass.

        noised_i   = (1 - time[images_i]) clean_i + time[images_i] noise_i
        embedded_i = weight noised_i + bias + time_embedding[images_i] + position[position_ids_i]

    Philox noise is regenerated in the forward and in the backward; nothing of its size is stored.

    Args:
        clean: [tokens, dim <= 256], floating. No gradient.
        noise: [tokens, dim], floating, or the coordinates from which it is regenerated. No gradient.
        time: [images] fp32 in [0, 1]: 0 data, 1 noise. No gradient.
        images: [tokens] int64, the image of each token.
        weight: [width, dim], floating; receives a gradient, as do bias and time_embedding.
        bias: [width], dtype of the weight.
        time_embedding: [images, width], dtype of the weight.
        position: [positions, width], floating. No gradient. With position_ids [tokens] int64.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [tokens, width] in the dtype of the weight, summed in fp32, rounded once; a row whose image or
        position is out of range is NaN, which no device read can report.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: rectified flow, arXiv 2209.03003; Philox, Salmon et al., SC 2011.
    """
    tensors = _check(clean, noise, time, images)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != clean.shape[1]:
        raise ValueError(
            f"{_NAME}: weight must be [width > 0, dim={clean.shape[1]}], got {list(weight.shape)}; "
            "as nn.Linear holds it"
        )
    if (position is None) != (position_ids is None):
        raise ValueError(f"{_NAME}: position and position_ids go together, got one of them; pass both")
    width = weight.shape[0]
    trained = {"weight": weight}
    if bias is not None:
        check_shape(_NAME, "bias", bias, (width,), "one value per row of weight")
        trained["bias"] = bias
    if time_embedding is not None:
        check_shape(_NAME, "time_embedding", time_embedding, (time.shape[0], width), "one row per image")
        trained["time_embedding"] = time_embedding
    if position is not None and position_ids is not None:
        check_shape(_NAME, "position", position, (position.shape[0], width), "one row per position")
        check_shape(_NAME, "position_ids", position_ids, (clean.shape[0],), "one per token")
        check_dtype(_NAME, "position", position, FLOATS)
        check_dtype(_NAME, "position_ids", position_ids, (torch.int64,))
        tensors |= {"position": position.detach(), "position_ids": position_ids}
    check_same_dtype(_NAME, trained)
    check_same_device(_NAME, tensors | trained)
    check_impl(_NAME, impl, weight)
    latents = (clean.detach(), time.detach(), images, *noise_arguments(noise))
    places = (tensors.get("position"), position_ids)
    if impl == "reference":
        return _cpu(*latents, weight, bias, time_embedding, *places)
    embedded: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained.values()):
        embedded = _FlowInput.apply(weight, bias, time_embedding, *latents, *places)  # type: ignore[no-untyped-call]
    else:
        embedded = _forward(*latents, weight, bias, time_embedding, *places)
    return embedded
