"""How near a reconstruction is to its picture: in pixels, in structure, and in the model's understanding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 11
_SIGMA = 1.5


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB.

        10 log10(peak^2 / mean (picture - reference)^2),  peak = 2

    Args:
        pictures, references: [n, channels, height, width] in [-1, 1].

    Returns: [n] fp64; infinite where both are equal.
    Raises: ValueError if the shapes differ.
    """
    _check(pictures, references, "psnr")
    error = (pictures.double() - references.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def ssim(pictures: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each picture, mean over channels and the places where the window fits.

        (2 mu_x mu_y + c1) (2 cov_xy + c2) / ((mu_x^2 + mu_y^2 + c1) (var_x + var_y + c2))

    with a Gaussian window of 11 pixels and deviation 1.5, on values in [0, 1], c1 = 0.01^2, c2 = 0.03^2.

    Args:
        pictures, references: [n, channels, height, width] in [-1, 1], at least 11 pixels on each side.

    Returns: [n] fp64 in [-1, 1].
    Raises: ValueError if the shapes differ or a side is shorter than the window.
    Source: Wang et al., "Image quality assessment", IEEE TIP 2004.
    """
    _check(pictures, references, "ssim")
    if min(pictures.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"ssim: sides must be at least {_WINDOW} pixels, "
            f"got {tuple(pictures.shape[-2:])}; enlarge both pictures"
        )
    x, y = (images.double() * 0.5 + 0.5 for images in (pictures, references))
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def local_mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        smooth = F.conv2d(F.conv2d(flat, line[None, None, :, None]), line[None, None, None, :])
        return smooth.view(*values.shape[:2], *smooth.shape[-2:])

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def cycle_similarity(inputs: Tensor, reconstructions: Tensor) -> Tensor:
    """[n] fp64: cosine of the understanding embeddings ([n, dim]) of each input and its reconstruction."""
    return F.cosine_similarity(inputs.double(), reconstructions.double(), dim=1)


def retrieval_rank(inputs: Tensor, reconstructions: Tensor) -> Tensor:
    """[n] int64: the place of a reconstruction's own input among all inputs, by cosine; 1 is the nearest.

    An input that is exactly as near as the own one counts as nearer.

    Args:
        inputs, reconstructions: [n, dim] understanding embeddings.
    """
    cosines = F.normalize(reconstructions.double(), dim=1) @ F.normalize(inputs.double(), dim=1).T
    return (cosines >= cosines.diagonal()[:, None]).sum(dim=1)


def _check(pictures: Tensor, references: Tensor, name: str) -> None:
    if pictures.ndim != 4 or pictures.shape != references.shape:
        raise ValueError(
            f"{name}: expected two batches [n, channels, height, width] of one shape, "
            f"got {tuple(pictures.shape)} and {tuple(references.shape)}"
        )
