"""Checks, schemas, fakes, autograd and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reca.kernels._checks import (
    FLOATS,
    check_dtype,
    check_impl,
    check_same_device,
    check_shape,
    compute_dtype,
)
from reca.kernels._library import Impl, define_op
from reca.kernels._philox import PhiloxNoise, check_noise, given_or_drawn, noise_arguments
from reca.kernels.diffusion_loss import reference

_MAX_DIM = 1024
_TABLE = "signal, noise, 1 / signal, noise / signal, clean, noised, log_posterior, log_beta"


def _noised_cpu(clean: Tensor, time: Tensor, table: Tensor, images: Tensor | None, *others: Any) -> Tensor:
    *coordinates, dtype = others
    noise = given_or_drawn(*(*coordinates, images, clean.shape[1]))
    return reference.noised(clean, noise, time, table, dtype)


def _noised_cuda(*arguments: Any) -> Tensor:
    from reca.kernels.diffusion_loss import kernel

    return kernel.noised(*arguments)


def _noised_fake(clean: Tensor, time: Tensor, *others: Any) -> Tensor:
    return clean.new_empty(time.shape[0], clean.shape[1], dtype=others[-1])


def _cpu(
    output: Tensor,
    clean: Tensor,
    time: Tensor,
    table: Tensor,
    mask: Tensor | None,
    images: Tensor | None,
    *others: Any,
) -> reference.Saved:
    *coordinates, with_gradient = others
    noise = given_or_drawn(*(*coordinates, images, clean.shape[1]))
    loss, squared, variational, gradient = reference.forward(output, clean, noise, time, table, mask)
    return loss, squared, variational, gradient if with_gradient else output.new_empty(0)


def _cuda(*arguments: Any) -> reference.Saved:
    from reca.kernels.diffusion_loss import kernel

    return kernel.forward(*arguments)


def _fake(output: Tensor, *others: Any) -> reference.Saved:
    rows, dtype = output.shape[:1], compute_dtype(output)
    loss, squared, variational = (output.new_empty(shape, dtype=dtype) for shape in ((), rows, rows))
    return loss, squared, variational, output.new_empty(output.shape if others[-1] else (0,))


_DRAWN = "Tensor? images, Tensor? noise, Tensor? samples, Tensor? rows, Tensor? step, int key"
_noised = define_op(
    f"diffusion_noise(Tensor clean, Tensor time, Tensor table, {_DRAWN}, ScalarType dtype) -> Tensor noised",
    cpu=_noised_cpu,
    cuda=_noised_cuda,
    fake=_noised_fake,
)
_forward = define_op(
    f"diffusion_loss(Tensor output, Tensor clean, Tensor time, Tensor table, Tensor? mask, {_DRAWN},"
    " bool with_gradient) -> (Tensor loss, Tensor squared_error, Tensor variational, Tensor gradient)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, squared_error, variational, gradient = _forward(output, *others, True)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(squared_error, variational)
        # Else two tensors of zeros would be made for what has no gradient.
        ctx.set_materialize_grads(False)
        return loss, squared_error, variational

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        gradient: Tensor = ctx.saved_tensors[0]
        return gradient * d_loss, *[None] * 10


def _check(
    operator: str,
    clean: Tensor,
    noise: Tensor | PhiloxNoise,
    time: Tensor,
    table: Tensor,
    images: Tensor | None,
) -> dict[str, Tensor]:
    """The tensors that both functions take, by name."""
    if clean.dim() != 2 or not 0 < clean.shape[1] <= _MAX_DIM:
        got = list(clean.shape)
        raise ValueError(f"{operator}: clean must be [tokens, 1 to {_MAX_DIM}], got {got}; flatten [B, T, D]")
    tokens, dim = clean.shape
    if time.dim() != 1 or time.shape[0] % max(tokens, 1) or bool(tokens) != bool(time.shape[0]):
        raise ValueError(
            f"{operator}: time must be [levels * tokens={tokens}], got {list(time.shape)}; "
            "row i belongs to clean row i mod tokens"
        )
    if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != reference.NUM_COEFFICIENTS:
        got = list(table.shape)
        raise ValueError(f"{operator}: table must be [times > 0, 8], got {got}; columns {_TABLE}")
    check_dtype(operator, "clean", clean, FLOATS)
    check_dtype(operator, "time", time, (torch.int64,))
    check_dtype(operator, "table", table, (torch.float32,))
    tensors = {"clean": clean, "time": time, "table": table}
    rows, num_images = time.shape[0], 0
    if isinstance(noise, PhiloxNoise):
        if images is None:
            raise ValueError(
                f"{operator}: images must be given to regenerate noise, got None; pass [rows] int64"
            )
        check_shape(operator, "images", images, (rows,), "the image of each row")
        check_dtype(operator, "images", images, (torch.int64,))
        tensors["images"] = images
        num_images = noise.samples.shape[0] if noise.samples.dim() else 0
    return tensors | check_noise(operator, noise, rows, dim, num_images)


def diffusion_noise(
    clean: Tensor,
    noise: Tensor | PhiloxNoise,
    time: Tensor,
    table: Tensor,
    *,
    images: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Rows of a variance-preserving diffusion at given times, each clean row at one or several of them.

        noised_i = signal[time_i] clean_(i mod tokens) + noise_level[time_i] noise_i

    Args:
        clean: [tokens, dim <= 1024], floating. No gradient.
        noise: [rows, dim], floating, or the coordinates from which it is regenerated, dim % 4 == 0.
        time: [rows = levels * tokens] int64, rows of the table. Out of range: NaN.
        table: [times, 8] fp32, see `diffusion_loss`.
        images: [rows] int64, the image of each row; needed to regenerate noise. Out of range: NaN.
        dtype: of the result; that of clean if None.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: [rows, dim] in `dtype`, formed in fp32 (fp64 for fp64), rounded once.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 2006.11239, eq. 4.
    """
    dtype = clean.dtype if dtype is None else dtype
    check_same_device("diffusion_noise", _check("diffusion_noise", clean, noise, time, table, images))
    if dtype not in FLOATS:
        raise TypeError(
            f"diffusion_noise: dtype must be floating, got {dtype}; leave it out for that of clean"
        )
    check_impl("diffusion_noise", impl, clean)
    arguments = (clean.detach(), time, table.detach(), images, *noise_arguments(noise), dtype)
    noised: Tensor = _noised_cpu(*arguments) if impl == "reference" else _noised(*arguments)
    return noised


def diffusion_loss(
    output: Tensor,
    clean: Tensor,
    noise: Tensor | PhiloxNoise,
    time: Tensor,
    table: Tensor,
    mask: Tensor | None = None,
    *,
    images: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise prediction with learned variance: squared error plus variational term, summed over rows.

        squared_error_i = mean_c (noise_ic - epsilon_ic)^2
        variational_i   = mean_c KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)) / ln 2   for t = time_i > 0
                          mean_c -log2 p(x_0 | x_1), in bins of 2 / 255 over [-1, 1]   for t = 0
        loss            = sum_i mask_i (squared_error_i + variational_i)

    epsilon and v are the halves of the output; p has the log variance f log_beta + (1 - f) log_posterior
    with f = (v + 1) / 2; its mean sees epsilon without gradient: the variational term trains only v.
    The gradient is formed with the loss; noised rows are recomputed, regenerated noise is not stored.

    Args:
        output: [rows, 2 * dim], floating: epsilon, then v; receives the gradient.
        clean: [tokens, dim <= 1024], floating; row i belongs to clean row i mod tokens. No gradient.
        noise: [rows, dim], floating, or the coordinates from which it is regenerated, dim % 4 == 0.
        time: [rows = levels * tokens] int64, rows of the table. Out of range: NaN.
        table: [times, 8] fp32, the columns signal and noise (x_t = signal x_0 + noise e), 1 / signal,
            noise / signal, the posterior mean's factors of x_0 and x_t, log_posterior, log_beta.
        mask: [rows] fp32, weight of each row; rows with 0 are not read. None counts all.
        images: [rows] int64, the image of each row; needed to regenerate noise. Out of range: NaN.
        impl: "auto" follows the device; "reference" is plain torch; "fused" is the Triton kernel.

    Returns: (loss scalar, squared_error [rows], variational [rows] in bits), fp32 (fp64 for fp64); the last
        two are unweighted, 0 where the mask is, without gradient. Divide by mask.sum() for the mean.
    Raises: ValueError for shapes, devices and "fused" off CUDA; TypeError for dtypes.
    Source: arXiv 2102.09672, eq. 15 and section 3.1; arXiv 2006.11239, eq. 13; per token: arXiv 2406.11838.
    """
    name = "diffusion_loss"
    tensors = _check(name, clean, noise, time, table, images)
    rows, dim = time.shape[0], clean.shape[1]
    check_shape(name, "output", output, (rows, 2 * dim), "[rows, 2 * dim], the noise and v")
    check_dtype(name, "output", output, FLOATS)
    tensors = {"output": output} | tensors
    if mask is not None:
        check_shape(name, "mask", mask, (rows,), "one weight per row")
        check_dtype(name, "mask", mask, (torch.float32,))
        tensors["mask"] = mask.detach()
    check_same_device(name, tensors)
    check_impl(name, impl, output)
    others = (clean.detach(), time, table.detach(), tensors.get("mask"), images, *noise_arguments(noise))
    if impl == "reference":
        loss, squared_error, variational, _ = _cpu(output, *others, False)
        return loss, squared_error.detach(), variational.detach()
    if output.requires_grad and torch.is_grad_enabled():
        loss, squared_error, variational = _DiffusionLoss.apply(output, *others)  # type: ignore[no-untyped-call]
    else:
        loss, squared_error, variational, _ = _forward(output, *others, False)
    return loss, squared_error, variational
