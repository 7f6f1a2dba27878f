"""BAGEL's training path: the official tensors, what is trained, and what no cut of a step may change."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from reca.engine.state import recomputed
from reca.errors import ConfigError
from reca.layers import attention
from reca.layers.attention import set_attention_backend
from reca.layers.rotary import rotary_table
from reca.layers.stream import Stream
from reca.models.bagel import transformer
from reca.models.bagel.batch import BagelBatch, BagelExample, TargetGroup, collate
from reca.models.bagel.checkpoint import bagel_slots
from reca.models.bagel.config import VARIANTS, BagelConfig
from reca.models.bagel.model import BagelModel
from reca.models.bagel.parity import reproduce
from reca.models.bagel.parity_training import load_pack_model, pack_batch, record
from reca.models.family import Pack
from reca.models.parity import compare, read_pack
from reca.profiling.launches import LaunchCounter
from reca.randomness import RandomSource

PACKS = Path(__file__).parents[1] / "data" / "parity" / "bagel"
TINY: BagelConfig = VARIANTS["tiny"].config
FULL: BagelConfig = VARIANTS["7b-mot"].config
RANDOM = RandomSource(seed=3, step=7)


def tiny_model() -> BagelModel:
    """A tiny model whose output layer is not zero, so that every trained weight has a gradient."""
    torch.manual_seed(0)
    model = BagelModel(TINY)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model


def example(text: Sequence[int] | None, patches: tuple[int, int], latents: tuple[int, int]) -> BagelExample:
    stride = TINY.latent_stride
    count = patches[0] * patches[1]
    target = torch.rand(3, latents[0] * stride, latents[1] * stride) * 2 - 1
    ids = None if text is None else tuple(text)
    return BagelExample(torch.rand(count, TINY.vision.patch_dim) * 2 - 1, patches, ids, target, latents)


def tiny_examples() -> list[BagelExample]:
    """Three samples of different shapes; the second has no text, two targets share a size."""
    torch.manual_seed(1)
    return [
        example([5, 6, 7], (2, 3), (3, 4)),
        example(None, (4, 1), (5, 2)),
        example([9], (1, 2), (3, 4)),
    ]


def tiny_batch() -> BagelBatch:
    return collate(TINY, tiny_examples(), [11, 4, 900])


def gradients(model: BagelModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model: BagelModel, *batches: BagelBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of some microbatches and the gradients that they leave behind."""
    model.zero_grad()
    losses = []
    for batch in batches:
        losses.append(model(batch, model.draw(batch, RANDOM))["reconstruction"])
        losses[-1].backward()
    return torch.stack([loss.detach() for loss in losses]).sum(), gradients(model)


def worst_relative(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[n] - e).abs().max() / e.abs().max()) for n, e in expected.items())


# The official tensors


@pytest.mark.parity
@pytest.mark.parametrize("case", ["tiny", "batch", "siglip"])
def test_every_tensor_and_gradient_of_the_official_code_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    reproduction = reproduce(pack)
    result = compare(pack, reproduction)
    assert result.failures == ()
    assert result.not_formed == {}
    assert pack.expected.keys() <= reproduction.tensors.keys()


@pytest.mark.parity
def test_a_pack_of_another_timestep_shift_fails() -> None:
    pack = read_pack(PACKS / "tiny")
    config = {**pack.description["config"], "timestep_shift": 1.1}
    other = Pack(pack.folder, {**pack.description, "config": config}, pack.inputs, pack.expected)
    failed = {failure.split(":")[0] for failure in compare(other, reproduce(other)).failures}
    assert {"loss", "velocity", "timesteps", "grad.vae2llm.weight"} <= failed


def test_a_pack_of_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown kind of pack 'trian'; did you mean 'train'"):
        reproduce(Pack(PACKS, {"model": "bagel", "kind": "trian"}, {}, {}))


@pytest.mark.parametrize("case", ["tiny", "batch"])
def test_exactly_the_tensors_with_official_gradients_are_trained(case: str) -> None:
    pack = read_pack(PACKS / case)
    model = load_pack_model(pack)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    official = {name for name, slot in bagel_slots(model.config).items() if slot.parameter in trained}
    assert official == {name.removeprefix("grad.") for name in pack.expected if name.startswith("grad.")}


def test_the_full_model_trains_as_many_parameters_as_the_official_code_changes() -> None:
    with torch.device("meta"):
        model = BagelModel(FULL)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_539_861_056


# What the decomposition rests on


class Torch(types.ModuleType):
    """torch, with `no_grad` switched off."""

    no_grad = contextlib.nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_no_gradient_passes_through_the_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = read_pack(PACKS / "batch")
    model = load_pack_model(pack)
    batch, draws = pack_batch(model.config, pack, 1.0)
    count = draws.counts["reconstruction"]
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "torch", Torch("torch"))  # the fault: nothing is detached any more
        loss = model(batch, draws)["reconstruction"] / count
    torch.testing.assert_close(loss, pack.expected["loss"], rtol=1e-5, atol=0)
    loss.backward()
    official = pack.expected["grad.language_model.model.layers.0.self_attn.o_proj_moe_gen.weight"]
    weight = model.blocks()[0].gen.o.weight
    assert weight.grad is not None
    with_fault = weight.grad.clone()
    model.zero_grad()
    (model(batch, draws)["reconstruction"] / count).backward()
    assert (with_fault - official).abs().max() > 1e-2 * official.abs().max()
    assert (weight.grad - official).abs().max() < 1e-5 * official.abs().max()


def test_image_and_text_rows_do_not_depend_on_trained_weights_but_markers_do() -> None:
    model, batch = tiny_model(), tiny_batch()

    def before_last_layer() -> Tensor:
        with record({"layer": model.layers[-1]}) as (inputs, _), torch.no_grad():
            model(batch, model.draw(batch, RANDOM))
        understanding: Tensor = inputs["layer"][0].rows
        return understanding

    old = before_last_layer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    new = before_last_layer()
    prefix = sum(batch.layout.kinds[:2])
    assert torch.equal(old[:prefix], new[:prefix])
    assert not torch.isclose(old[prefix:], new[prefix:]).all(dim=1).any()


def test_recomputing_a_layer_repeats_nothing_that_the_backward_pass_does_not_need() -> None:
    model, batch = tiny_model(), tiny_batch()
    calls: dict[str, int] = {}
    for name in ("und.qkv", "und.o", "und.mlp.gate_up", "gen.o"):
        module = model.layers[0].get_submodule(name)

        def count(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        module.register_forward_hook(count)
    _, expected = loss_and_gradients(model, batch)
    calls.clear()
    for layer in model.blocks():
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward: checkpoint(_forward, *args, use_reentrant=False)  # type: ignore[method-assign]
    _, got = loss_and_gradients(model, batch)
    assert worst_relative(got, expected) == 0
    assert calls == {"und.qkv": 2, "gen.o": 2, "und.o": 1, "und.mlp.gate_up": 1}


def test_a_recomputed_layer_keeps_one_tensor_of_each_stream() -> None:
    model, batch = tiny_model(), tiny_batch()
    _, expected = loss_and_gradients(model, batch)
    kept: list[bool] = []
    layer = model.blocks()[1]
    forward = layer.forward
    layer.forward = lambda *args: kept.extend(s.delta is None for s in args[:2]) or forward(*args)  # type: ignore[method-assign, func-returns-value]
    with recomputed(model.blocks(), enabled=True):
        _, got = loss_and_gradients(model, batch)
    assert kept == [True] * 4  # in the forward and once more in the backward
    assert worst_relative(got, expected) < 1e-6


def test_a_layer_copies_no_keys_and_forms_residual_sums_inside_its_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "choose_backend", lambda *ask: "varlen")  # as on a GPU
    real = tiny_batch()
    with FakeTensorMode() as mode:
        model, layout = BagelModel(TINY), real.layout.map(mode.from_tensor)
        dim, rows = TINY.llm.hidden_size, (sum(layout.kinds), sum(layout.latent_lengths))
        understanding, latents = (Stream(torch.zeros(n, dim), torch.zeros(n, dim)) for n in rows)
        for part in latents:
            part.requires_grad_()
        rotation = rotary_table(layout.positions, TINY.llm.head_dim)
        with LaunchCounter() as counter, torch.autocast("cpu", torch.bfloat16):
            _, after = model.layers[0](understanding, latents, layout, rotation)
            torch.autograd.backward([*after], [torch.zeros_like(part) for part in after])
    numbers: Counter[str] = Counter()
    for launch, times in counter.launches.items():
        numbers[launch.operator] += times
    assert numbers["reca::qk_norm_rope_into"] == 2 and numbers["reca::rms_norm"] == 4
    assert numbers["aten::cat"] == 1  # the attention outputs of image, text and markers
    assert numbers["aten::slice_backward"] == numbers["aten::add"] == numbers["aten::add_"] == 0


# Cuts, orders and arithmetic


def test_losses_and_gradients_do_not_depend_on_microbatching() -> None:
    model, examples, ids = tiny_model(), tiny_examples(), [11, 4, 900]
    loss, expected = loss_and_gradients(model, tiny_batch())
    single = [collate(TINY, [e], [i]) for e, i in zip(examples, ids, strict=True)]
    parts, got = loss_and_gradients(model, *single)
    torch.testing.assert_close(parts, loss, rtol=1e-6, atol=0)
    assert worst_relative(got, expected) < 1e-5


def test_draws_are_pure_and_belong_to_the_sample_not_to_its_place() -> None:
    model, examples = tiny_model(), tiny_examples()
    batch = tiny_batch()
    draws, again = model.draw(batch, RANDOM), model.draw(batch, RANDOM)
    moved = model.draw(collate(TINY, examples[::-1], [900, 4, 11]), RANDOM)
    assert torch.equal(draws.time, again.time) and torch.equal(draws.noise, again.noise)
    assert torch.equal(moved.time, draws.time.flip(0))
    rows = draws.noise.split(batch.layout.latent_lengths)
    assert torch.equal(moved.noise, torch.cat(rows[::-1]))
    assert torch.equal(moved.posterior[0], draws.posterior[0].flip(0))
    assert not torch.equal(model.draw(batch, RANDOM.at(8)).noise, draws.noise)
    assert int(draws.counts["reconstruction"]) == sum(batch.layout.latent_lengths) == 34


def test_one_time_per_image_moves_towards_noise_under_a_shift() -> None:
    model, batch = tiny_model(), tiny_batch()
    plain = model.draw(batch, RANDOM).time
    model.timestep_shift = 3.0
    assert plain.shape == (3,) and plain.min() > 0 and plain.max() < 1
    torch.testing.assert_close(model.draw(batch, RANDOM).time, 3 * plain / (1 + 2 * plain))


def test_targets_of_equal_size_are_encoded_together_as_each_would_be_alone() -> None:
    model, batch = tiny_model(), tiny_batch()
    assert [group.images for group in batch.targets] == [(0, 2), (1,)]
    together = model.encode_target(batch, model.draw(batch, RANDOM)).split(batch.layout.latent_lengths)
    for index, (one, sample) in enumerate(zip(tiny_examples(), (11, 4, 900), strict=True)):
        alone = collate(TINY, [one], [sample])
        torch.testing.assert_close(together[index], model.encode_target(alone, model.draw(alone, RANDOM)))


def test_cached_moments_give_the_step_that_pixels_give() -> None:
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        cached = [
            TargetGroup("moments", group.images, model.vae.moments(group.values)) for group in batch.targets
        ]
    from_cache = collate(TINY, tiny_examples(), [11, 4, 900], targets=cached)
    expected, got = (model(b, model.draw(b, RANDOM))["reconstruction"] for b in (batch, from_cache))
    assert torch.equal(got, expected)


def test_an_attention_back_end_changes_nothing_but_rounding() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    set_attention_backend(model, "reference")
    assert {m.attention_backend for m in model.modules() if hasattr(m, "attention_backend")} == {"reference"}
    other, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    assert worst_relative(got, expected) < 1e-5


def test_bf16_stays_close_to_fp32_and_keeps_time_loss_and_gradients_in_fp32() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with record({"layer": model.layers[0]}) as (_, outputs), torch.autocast("cpu", torch.bfloat16):
        rounded, got = loss_and_gradients(model, batch)
    assert [part.dtype for stream in outputs["layer"] for part in stream] == [torch.bfloat16] * 4
    assert rounded.dtype == model.draw(batch, RANDOM).time.dtype == torch.float32
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
    flat, flat_expected = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0) > 0.999


@pytest.mark.slow
def test_every_block_compiles_as_one_graph_with_equal_results() -> None:
    model, batch = tiny_model(), tiny_batch()
    loss, expected = loss_and_gradients(model, batch)
    for block in model.blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, got = loss_and_gradients(model, batch)
    torch.testing.assert_close(compiled, loss, rtol=1e-6, atol=0)
    assert worst_relative(got, expected) < 1e-5


# Full size, without memory


def full_batch(images: int, kind: str) -> BagelBatch:
    """Images of 1024 x 1024 with an instruction of 24 tokens."""
    shape = (3, 1024, 1024) if kind == "pixels" else (32, 128, 128)
    one = BagelExample(torch.zeros(256, 588), (16, 16), (7,) * 24, torch.zeros(shape), (64, 64), kind)  # type: ignore[arg-type]
    return collate(FULL, [one] * images, range(images))


def test_the_least_flops_of_a_full_size_image_are_those_of_the_published_analysis() -> None:
    with torch.device("meta"):
        model = BagelModel(FULL)
    per_image = model.flops(full_batch(2, "moments")) / 2
    assert abs(per_image / 185.6e12 - 1) < 1e-3
