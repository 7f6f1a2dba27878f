"""Trains what the quickstart starts from, from nothing, on the shipped photographs that are not held out.

    python -m reca.recipes.quickstart_base --out DIR

1. Autoencoder: photographs <-> latents.
2. Understanding: vision tower, connector and understanding expert see small pictures and are trained, through
   throw-away heads, to keep what is in them, to fill in hidden patches, and to know two views of one
   photograph from views of others. Instructions are never learnt: their embeddings stay random.
3. Generator: flow matching on the photographs, given an instruction and the understanding of another version
   of the photograph, mirrored or not, with its colour channels in any order. So it makes a picture like the
   one it sees, as captions teach it, but not that one: to listen to all it sees is what RecA teaches it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from reca.data.prompts import load_prompts
from reca.files import write_text
from reca.images import patchify
from reca.layers.attention import attention
from reca.layers.norm import RMSNorm
from reca.layers.segments import Segments
from reca.models import get_variant
from reca.models.bagel.batch import BagelBatch, BagelExample, collate, grid_positions
from reca.models.bagel.checkpoint import save
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.model import BagelModel
from reca.models.bagel.vae import FluxVAE
from reca.randomness import RandomSource
from reca.recipes.quickstart_photos import crops, pyramid, training_photos

SEED = 20_250_909  # the date of the RecA paper
STEPS = {"autoencoder": 1500, "understanding": 1200, "generator": 2000}
_SIDES = (64, 72, 88, 112, 144)  # shortest sides of the photographs that crops of 64 pixels are cut from
_POOL = 2048  # crops that the generator learns from
_CHANNEL_ORDERS = tuple(itertools.permutations(range(3)))
_REPORT_EVERY = 50
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def initialise(module: nn.Module, random: RandomSource, quiet: tuple[str, ...] = ()) -> None:
    """Normal weights of variance 1 / fan-in, zero biases, unit norms; zero weights where named in `quiet`."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith(quiet):
                parameter.zero_()
            else:
                normal = random.normal(f"initialise/{name}", torch.tensor([0]), parameter.numel())
                parameter.copy_(normal.view(parameter.shape) / math.sqrt(parameter[0].numel()))


def optimise(
    parameters: Sequence[Tensor], steps: int, lr: float, loss_at: Callable[[int], Tensor], label: str
) -> None:
    """AdamW under a cosine schedule after a short warm-up; prints how the loss falls."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _REPORT_EVERY == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"{label} {step:5d}/{steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


def _edges(pixels: Tensor) -> Tensor:
    corner = pixels[..., :-1, :-1]
    return torch.cat([pixels[..., 1:, :-1] - corner, pixels[..., :-1, 1:] - corner], dim=1)


def train_autoencoder(vae: FluxVAE, levels: list[Tensor], steps: int) -> None:
    """Errors of pixels and edges, and a small divergence from the normal prior; then unit deviation."""
    random, side, batch = RandomSource(SEED), 48, 8
    initialise(vae, random, quiet=("conv2.weight", "to_out.0.weight"))

    def loss_at(step: int) -> Tensor:
        source = random.at(step)
        pixels = crops(levels, batch, side, source)
        mean, logvar = vae.moments(pixels).chunk(2, dim=1)
        noise = source.normal("posterior", torch.arange(batch), mean[0].numel()).view(mean.shape)
        decoded = vae.decode(vae.sample(torch.cat([mean, logvar], dim=1), noise))
        error = decoded - pixels
        edges = (_edges(decoded) - _edges(pixels)).abs().mean()
        prior = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * error.square().mean() + edges + 2e-3 * prior

    optimise(list(vae.parameters()), steps, 1e-3, loss_at, "autoencoder")
    _standardise(vae, levels)


@torch.no_grad()
def _standardise(vae: FluxVAE, levels: list[Tensor]) -> None:
    """Scale each latent channel to unit deviation; the next convolution undoes it: pictures stay the same."""
    channels = vae.config.z_channels
    mean = vae.moments(crops(levels, 64, 64, RandomSource(SEED, step=1 << 20)))[:, :channels]
    scale = 1 / mean.transpose(0, 1).flatten(1).std(dim=1)
    last, first = vae.autoencoder.encoder.conv_out, vae.autoencoder.decoder.conv_in
    last.weight[:channels] *= scale[:, None, None, None]
    last.bias[:channels] *= scale
    last.bias[channels:] += 2 * scale.log()
    first.weight /= scale[None, :, None, None]


def _patches(pixels: Tensor, patch: int) -> Tensor:
    """[n, 3, height, width] -> [n * patches, 3 * patch^2]."""
    return torch.cat([patchify(image, patch) for image in pixels])


def _shrunk(pixels: Tensor, side: int) -> Tensor:
    """[n, 3, side, side]: the small view of [n, 3, height, width] crops."""
    size = (side, side)
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def see(model: BagelModel, views: Tensor) -> Tensor:
    """[n * patches, dim]: connector output of [n, 3, height, width] small views."""
    config = model.config
    rows = views.shape[-1] // config.vision.patch_size
    positions = grid_positions(rows, rows, config.vit_max_num_patch_per_side).repeat(len(views))
    encoded: Tensor = model.connector(
        model.vision(
            _patches(views, config.vision.patch_size), positions, Segments.of([rows * rows] * len(views))
        )
    )
    return encoded


def _understood(model: BagelModel, encoded: Tensor, images: int) -> Tensor:
    """[n * patches, dim]: what the understanding expert makes of images that stand alone."""
    special, count = model.config.special, encoded.shape[0] // images
    positions = model.vision_positions.repeat(images, 1)
    ids = torch.tensor([special.start_of_image, special.end_of_image])
    start, end = torch.chunk(model.embed_tokens(ids), 2)
    blocks = [torch.cat([start, block, end]) for block in torch.chunk(encoded + positions, images)]
    hidden, segments = torch.cat(blocks), Segments.of([count + 2] * images)
    for layer in model.blocks():
        attended = attention(*layer.und.project(hidden), segments)
        hidden = layer.und.finish(hidden, attended)
    return torch.cat([block[1:-1] for block in torch.chunk(hidden, images)])


def train_understanding(model: BagelModel, levels: list[Tensor], steps: int) -> None:
    """Keep the picture, fill in hidden patches, tell photographs apart; then centre the embeddings."""
    random, batch = RandomSource(SEED + 1), 16
    view_side, patch = model.config.vision.image_size, model.config.latent_stride
    dim = model.config.llm.hidden_size
    heads = nn.ModuleDict(
        {
            "keep": nn.Sequential(
                RMSNorm(dim, 1e-6), nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 3 * patch**2)
            ),
            "fill": nn.Sequential(RMSNorm(dim, 1e-6), nn.Linear(dim, 3 * patch**2)),
        }
    )
    initialise(heads, random)
    parts: list[nn.Module] = [model.vision, model.connector, model.embed_tokens, heads]
    parts += [layer.und for layer in model.blocks()]
    parameters = [parameter.requires_grad_() for part in parts for parameter in part.parameters()]

    def loss_at(step: int) -> Tensor:
        source = random.at(step)
        whole = crops(levels, batch, 64, source)
        # The second view: the middle of the first, mirrored.
        middle = F.interpolate(
            whole[:, :, 8:-8, 8:-8].flip(-1), (64, 64), mode="bilinear", align_corners=False
        )
        pixels = torch.cat([whole, middle])
        encoded = see(model, _shrunk(pixels, view_side))
        kept = F.mse_loss(heads["keep"](encoded), _patches(pixels, patch))
        count = encoded.shape[0] // len(pixels)
        shown = source.uniform("shown", torch.arange(batch), count).flatten()[:, None] < 0.5
        filled = heads["fill"](_understood(model, encoded[: batch * count] * shown, batch))
        hidden = F.mse_loss(filled, _patches(whole, patch))
        pooled = encoded.view(len(pixels), count, -1).mean(dim=1)
        one, other = F.normalize(pooled, dim=1).chunk(2)
        apart = F.cross_entropy(one @ other.T / 0.2, torch.arange(batch))
        centre = pooled.mean(dim=0).square().mean()
        return 5 * kept + 5 * hidden + 0.1 * apart + 0.1 * centre

    optimise(parameters, steps, 1.5e-3, loss_at, "understanding")
    with torch.no_grad():
        views = _shrunk(crops(levels, 256, 64, RandomSource(SEED + 1, step=1 << 20), jitter=0.0), view_side)
        model.connector.fc2.bias.sub_(see(model, views).mean(dim=0))


def train_generator(model: BagelModel, levels: list[Tensor], tokenizer: Tokenizer, steps: int) -> None:
    """Flow matching on crops, given an instruction and the understanding of another version of the crop."""
    random, batch = RandomSource(SEED + 2), 16
    model.requires_grad_(False)
    parameters = [
        parameter.requires_grad_() for part in model.trained_modules() for parameter in part.parameters()
    ]
    instructions = [tuple(tokenizer.encode(prompt).ids) for prompt in load_prompts(None)]
    views, moments = _pool(model, levels, min(_POOL, steps * batch), random)

    def loss_at(step: int) -> Tensor:
        source = random.at(step)
        ids = [step * batch + index for index in range(batch)]
        chosen = [source.integer("crop", sample, len(views)) for sample in ids]
        seen = [_version(views[index], source, sample) for index, sample in zip(chosen, ids, strict=True)]
        texts = [instructions[source.integer("instruction", sample, len(instructions))] for sample in ids]
        data = _paired_batch(model.config, seen, texts, [moments[index] for index in chosen], ids)
        draws = model.draw(data, source)
        loss: Tensor = model(data, draws)["reconstruction"] / draws.counts["reconstruction"]
        return loss

    optimise(parameters, steps, 2e-3, loss_at, "generator")


@torch.no_grad()
def _pool(model: BagelModel, levels: list[Tensor], count: int, random: RandomSource) -> tuple[Tensor, Tensor]:
    """Small views and posterior moments of `count` crops, encoded once."""
    views, moments = [], []
    for start in range(0, count, 32):
        pixels = crops(levels, min(32, count - start), 64, random.at((1 << 20) + start))
        views.append(_shrunk(pixels, model.config.vision.image_size))
        moments.append(model.vae.moments(pixels))
    return torch.cat(views), torch.cat(moments)


def _version(view: Tensor, source: RandomSource, sample: int) -> Tensor:
    """The same picture, perhaps mirrored, with its colour channels in any order."""
    mirrored = view.flip(-1) if source.integer("mirror", sample, 2) else view
    return mirrored[list(_CHANNEL_ORDERS[source.integer("colours", sample, len(_CHANNEL_ORDERS))])]


def _paired_batch(
    config: BagelConfig,
    views: Sequence[Tensor],
    texts: Sequence[tuple[int, ...]],
    moments: Sequence[Tensor],
    ids: Sequence[int],
) -> BagelBatch:
    """A microbatch as RecA trains on, except that the picture that is seen is not the one to be made."""
    patch, latent_patch = config.vision.patch_size, config.latent_patch_size
    examples = [
        BagelExample(
            patches=patchify(view, patch),
            patch_grid=(view.shape[1] // patch, view.shape[2] // patch),
            text_ids=text,
            target=target,
            latent_grid=(target.shape[1] // latent_patch, target.shape[2] // latent_patch),
            kind="moments",
        )
        for view, text, target in zip(views, texts, moments, strict=True)
    ]
    return collate(config, examples, ids)


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE of the shipped instructions; every byte has a token, so that any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_prompts(None), trainer)
    return tokenizer


def make_base(steps: dict[str, int]) -> tuple[BagelModel, Tokenizer]:
    """All three stages; fewer steps are for tests."""
    _, variant = get_variant("bagel/quickstart")
    levels = pyramid(training_photos(), _SIDES)
    tokenizer = train_tokenizer(variant.config.llm.vocab_size)
    model = BagelModel(variant.config)
    initialise(model, RandomSource(SEED), quiet=("llm2vae.weight",))
    train_autoencoder(model.vae.requires_grad_(), levels, steps["autoencoder"])
    train_understanding(model, levels, steps["understanding"])
    train_generator(model, levels, tokenizer, steps["generator"])
    return model, tokenizer


def main() -> None:
    """Train everything and write the folder of an official release, in bf16."""
    parser = argparse.ArgumentParser(
        description="Train the weights that `reca train quickstart` starts from."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out
    model, tokenizer = make_base(STEPS)
    save(model.to(torch.bfloat16), out)
    write_text(out / "tokenizer.json", tokenizer.to_str())


if __name__ == "__main__":
    main()
