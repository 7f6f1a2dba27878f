"""OpenUni's training path: the official tensors, what is trained, and what no cut of a step may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from reca.errors import ConfigError
from reca.layers.implementation import set_kernels
from reca.models.family import Pack
from reca.models.openuni.batch import OpenUniBatch, OpenUniExample, Task, collate
from reca.models.openuni.config import VARIANTS, OpenUniConfig
from reca.models.openuni.flops import encoder_flops, flop_parts, vision_flops
from reca.models.openuni.model import OpenUniModel
from reca.models.openuni.parity import reproduce
from reca.models.openuni.parity_training import load_pack_model, record
from reca.models.openuni.sana import LinearAttention, build_sana
from reca.models.parity import compare, read_pack
from reca.randomness import RandomSource

PACKS = Path(__file__).parents[1] / "data" / "parity" / "openuni"
TINY: OpenUniConfig = VARIANTS["tiny"].config
RANDOM = RandomSource(seed=3, step=7)


def tiny_model(config: OpenUniConfig = TINY) -> OpenUniModel:
    torch.manual_seed(0)
    return OpenUniModel(config)


def prompt(text: Sequence[int], *, image: bool = True, config: OpenUniConfig = TINY) -> tuple[int, ...]:
    special = config.special
    picture = (special.start_of_image, *(special.image,) * config.vision.num_embeddings, special.end_of_image)
    return (special.im_start, *(picture if image else ()), *text, special.im_end, special.start_of_image)


def examples(task: Task = "reconstruction") -> list[OpenUniExample]:
    """Three samples with prompts of different length; the second says nothing."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    texts: list[tuple[int, ...]] = [(5, 6, 7), (), (9,) * 6]
    return [
        OpenUniExample(task, prompt(text, image=task == "reconstruction"), image, 90)
        for text, image in zip(texts, pixels, strict=True)
    ]


def tiny_batch(task: Task = "reconstruction") -> OpenUniBatch:
    return collate(TINY, examples(task), [11, 4, 900])


def loss_and_gradients(model: OpenUniModel, *batches: OpenUniBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of some microbatches and the gradients that they leave behind."""
    model.zero_grad()
    losses = []
    for batch in batches:
        (loss,) = model(batch, model.draw(batch, RANDOM)).values()
        losses.append(loss)
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([loss.detach() for loss in losses]).sum(), grads


def worst_relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((got[name] - expected[name]).abs().max()) for name in expected) / scale


# The official tensors


@pytest.mark.parity
@pytest.mark.parametrize("case", ["l1024", "internvl"])
def test_every_official_tensor_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    result = compare(pack, reproduce(pack))
    assert result.failures == ()
    assert not result.not_formed


def test_an_unknown_kind_of_pack_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown kind of pack 'recom'; did you mean 'recon'"):
        reproduce(Pack(Path("pack"), {"kind": "recom"}, {}, {}))


def test_linear_attention_is_diffusers_own_up_to_rounding() -> None:
    torch.manual_seed(2)
    sana = build_sana(replace(TINY.sana, qk_norm="rms_norm_across_heads"))
    attn: Any = sana.transformer_blocks[0].attn1
    hidden = torch.randn(2, 7, TINY.sana.width)
    assert isinstance(attn.processor, LinearAttention)
    ours = attn(hidden)
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    attn.set_processor(SanaLinearAttnProcessor2_0())
    torch.testing.assert_close(ours, attn(hidden), rtol=1e-5, atol=1e-6)


class ProductDtypes(TorchDispatchMode):
    """Collects the dtypes of all batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_linear_attention_stays_in_fp32_under_autocast() -> None:
    sana = build_sana(TINY.sana)
    set_kernels(sana, "reference")  # the operators' own arithmetic is tested with them
    attn: Any = sana.transformer_blocks[0].attn1
    with torch.autocast("cpu", torch.bfloat16), ProductDtypes() as products:
        attn(torch.randn(2, 7, TINY.sana.width))
    assert products.seen == {torch.float32}


# What is trained


def test_the_mllm_and_the_autoencoder_are_frozen_and_all_the_rest_is_trained() -> None:
    model = tiny_model()
    _, grads = loss_and_gradients(model, tiny_batch())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"meta_queries", "connector", "projector", "sana"}
    assert grads.keys() == trained
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {
        "vision",
        "aligner",
        "embed_tokens",
        "layers",
        "norm",
        "lm_head",
        "vae",
    }


def test_no_gradient_reaches_a_prompt_row() -> None:
    model, batch = tiny_model(), tiny_batch()
    watched: dict[str, Any] = {"first": model.layers[0], "last": model.layers[-1]}
    with record(watched) as (inputs, outputs):
        model(batch, model.draw(batch, RANDOM))
    assert [stream.rows.requires_grad for stream in outputs["first"]] == [False, True]
    # behind the last layer nobody reads the prompts: they leave it as they came
    assert outputs["last"][0] is inputs["last"][0]


def test_linear_attention_is_homogeneous_so_its_queries_gradient_is_orthogonal_to_them() -> None:
    model = load_pack_model(read_pack(PACKS / "l1024"))
    _, grads = loss_and_gradients(model, collate(model.config, pack_examples(model.config), [1]))
    weights = dict(model.named_parameters())
    name = "sana.transformer_blocks.0.attn1.{}.weight"
    radial = {
        part: float((grads[name.format(part)] * weights[name.format(part)].detach()).sum())
        for part in ("to_q", "to_v")
    }
    assert abs(radial["to_q"]) < 1e-3 * abs(radial["to_v"])


def pack_examples(config: OpenUniConfig) -> list[OpenUniExample]:
    pixels = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return [OpenUniExample("reconstruction", prompt((5, 6), config=config), pixels, 90)]


# What no cut of a step may change


@pytest.mark.parametrize("task", ["reconstruction", "text_to_image"])
def test_gradients_do_not_depend_on_microbatching(task: Task) -> None:
    model, ids = tiny_model(), [11, 4, 900]
    loss, expected = loss_and_gradients(model, tiny_batch(task))
    parts = [collate(TINY, [example], [i]) for example, i in zip(examples(task), ids, strict=True)]
    split, got = loss_and_gradients(model, *parts)
    torch.testing.assert_close(split, loss, rtol=1e-5, atol=0)
    assert worst_relative(got, expected) < 1e-5


def test_embeddings_and_latents_given_beforehand_change_nothing() -> None:
    model, batch = tiny_model(), tiny_batch()
    draws = model.draw(batch, RANDOM)
    given = replace(
        batch, pixels=None, latents=model.encode_target(batch), embeddings=model.understand(batch, draws)
    )
    loss, expected = loss_and_gradients(model, batch)
    again, got = loss_and_gradients(model, given)
    assert torch.equal(again, loss)
    assert worst_relative(got, expected) == 0
    with pytest.raises(ValueError, match="neither pixels nor what replaces them"):
        model(replace(given, latents=None), draws)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        forward = block.forward
        block.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)  # type: ignore[method-assign]
    recomputed, got = loss_and_gradients(model, batch)
    assert torch.equal(recomputed, loss)
    assert worst_relative(got, expected) < 1e-6


def test_each_task_yields_its_own_term_and_counts_images() -> None:
    model = tiny_model()
    for task in ("reconstruction", "text_to_image"):
        batch = tiny_batch(task)
        draws = model.draw(batch, RANDOM)
        assert model(batch, draws).keys() == draws.counts.keys() == {task}
        assert float(draws.counts[task]) == 3


def test_frozen_bf16_weights_under_autocast_stay_near_fp32() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with record({"layer": model.layers[0]}) as (_, outputs), torch.autocast("cpu", torch.bfloat16):
        rounded, got = loss_and_gradients(model, batch)
    assert [stream.rows.dtype for stream in outputs["layer"]] == [torch.bfloat16, torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
    flat, flat_expected = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.99


# Random decisions


def test_times_are_the_thousandths_of_the_official_schedule_and_shift_moves_them_to_noise() -> None:
    model = tiny_model()
    batch = collate(TINY, examples() * 40, range(120))
    time = model.draw(batch, RANDOM).time
    assert torch.equal((time * 1000).round() / 1000, time)
    assert 0 < float(time.min()) < 0.05 and 0.95 < float(time.max()) <= 1
    model.timestep_shift = 3.0
    torch.testing.assert_close(model.draw(batch, RANDOM).time, 3 * time / (1 + 2 * time))


def test_draws_belong_to_the_sample_not_to_its_place() -> None:
    model, made = tiny_model(), examples()
    draws = model.draw(collate(TINY, made, [11, 4, 900]), RANDOM)
    moved = model.draw(collate(TINY, made[::-1], [900, 4, 11]), RANDOM)
    assert torch.equal(draws.time, moved.time.flip(0))
    assert torch.equal(draws.noise, moved.noise.flip(0))


def test_stochastic_depth_is_off_unless_asked_for_and_spares_the_first_layer() -> None:
    batch = collate(TINY, examples() * 40, range(120))
    assert tiny_model().draw(batch, RANDOM).kept is None
    config = replace(TINY, vision=replace(TINY.vision, drop_path_rate=0.25))
    kept = tiny_model(config).draw(batch, RANDOM).kept
    assert kept is not None and kept.shape == (2, 2, 120)
    assert torch.equal(kept[0], torch.ones(2, 120))
    assert set(kept[1].flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert abs(float((kept[1] == 0).float().mean()) - 0.25) < 0.06


def test_a_dropped_branch_leaves_its_image_as_it_was_and_no_other() -> None:
    model, pixels = tiny_model(), torch.stack([example.pixels for example in examples()])
    rows = tiny_batch().prompts.vision
    assert rows is not None
    kept = torch.ones(2, 2, 3)
    kept[:, :, 1] = 0
    full, dropped = model.vision(pixels, rows), model.vision(pixels, rows, kept)
    assert torch.equal(dropped[1], model.vision.embed(model.vision.view(pixels))[1, 1:])
    assert torch.equal(dropped[[0, 2]], full[[0, 2]])


@pytest.mark.parametrize("branch, silenced", [(0, "out"), (1, "fc2")])
def test_factors_are_those_of_the_attention_then_of_the_mlp(branch: int, silenced: str) -> None:
    model, pixels = tiny_model(), torch.stack([example.pixels for example in examples()])
    rows = tiny_batch().prompts.vision
    assert rows is not None
    for layer in model.vision.layers:
        for parameter in layer.get_submodule(silenced).parameters():
            torch.nn.init.zeros_(parameter)
    kept = torch.ones(2, 2, 3)
    kept[:, branch] = 0
    assert torch.equal(model.vision(pixels, rows, kept), model.vision(pixels, rows))
    assert not torch.equal(model.vision(pixels, rows, kept.flip(1)), model.vision(pixels, rows))


# Full size, without memory


def full_batch(variant: str, *, given: bool) -> OpenUniBatch:
    """One image with a prompt of 323 rows, the longest of an official batch."""
    config, size = VARIANTS[variant].config, VARIANTS[variant].target.max_size
    ids = prompt((7,) * 63, config=config)
    assert len(ids) == 324
    batch = collate(config, [OpenUniExample("reconstruction", ids[1:], torch.zeros(3, size, size), 0)], [0])
    if not given:
        return batch
    latents, embeddings = torch.zeros(1, *batch.latent_shape), torch.zeros(256, config.llm.hidden_size)
    return replace(batch, pixels=None, latents=latents, embeddings=embeddings)


@pytest.mark.parametrize(
    "variant, without_prompts, with_prompts", [("l-512", 4.17, 4.96), ("b-512", 1.39, None)]
)
def test_the_least_flops_of_an_image_are_those_of_the_published_analysis(
    variant: str, without_prompts: float, with_prompts: float | None
) -> None:
    parts = flop_parts(VARIANTS[variant].config, full_batch(variant, given=True))
    trained = parts["queries"] + parts["connector"] + parts["sana"]
    assert abs(trained / (without_prompts * 1e12) - 1) < 0.02
    assert with_prompts is None or abs((trained + parts["prompts"]) / (with_prompts * 1e12) - 1) < 0.02
    assert parts["vision"] == parts["autoencoder"] == 0


@pytest.mark.parametrize("variant, vision, autoencoder", [("b-512", 726, 1295), ("l-1024", 728, 5180)])
def test_the_frozen_encoders_cost_what_the_official_step_pays_for_them(
    variant: str, vision: float, autoencoder: float
) -> None:
    config, batch = VARIANTS[variant].config, full_batch(variant, given=False)
    assert round(vision_flops(config) / 1e9) == vision
    assert abs(encoder_flops(config.autoencoder, batch.latent_shape) / 1e9 - autoencoder) < 1
