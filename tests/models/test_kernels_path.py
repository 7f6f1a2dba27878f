"""Which implementation of the operators a model uses: chosen once, the same numbers whatever is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reca.commands.verify import verify
from reca.config import ComputeConfig
from reca.errors import ConfigError
from reca.kernels import PhiloxNoise, interpreted_kernels, runs_fused
from reca.layers.implementation import activation_dtype, set_kernels
from reca.models import get_family, get_variant
from reca.models.bagel import model as bagel
from reca.models.bagel.batch import BagelExample, collate
from reca.models.parity import compare, read_pack
from reca.randomness import RandomSource
from reca.recipes.assemble import load_model

PACKS = Path(__file__).parents[1] / "data" / "parity"
TRAINING = ["bagel/tiny", "harmon/tiny_huge", "janus/batch", "openuni/l1024", "showo/tiny_clip"]


@pytest.mark.parity
@pytest.mark.parametrize("case", TRAINING)
def test_plain_torch_reproduces_every_official_tensor_and_gradient_too(case: str) -> None:
    pack = replace(read_pack(PACKS / case), kernels="reference")
    result = compare(pack, get_family(pack.description["model"]).reproduce(pack))
    assert result.failures == ()


@pytest.mark.parametrize("family", [case.split("/")[0] for case in TRAINING])
def test_every_module_that_calls_operators_is_told_which(family: str) -> None:
    name = next(name for name in get_family(family).variants if name.startswith("tiny"))
    loaded = load_model(f"{family}/{name}", "random", ComputeConfig(kernels="reference"))
    held = [module.kernels for module in loaded.model.modules() if hasattr(module, "kernels")]
    assert held and set(held) == {"reference"}


def test_fused_kernels_are_refused_on_a_cpu_before_anything_is_trained() -> None:
    message = "kernels=fused needs CUDA tensors, but the model is on cpu; use kernels=auto, or a GPU"
    with pytest.raises(ConfigError, match=message):
        load_model("bagel/tiny", "random", ComputeConfig(device="cpu", kernels="fused"))


def test_fused_packs_need_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="start with TRITON_INTERPRET=1, or use kernels=auto"):
        verify([PACKS / "bagel" / "tiny"], "fused")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is not 1; set it at the start"):
        interpreted_kernels().__enter__()


def test_where_kernels_run() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [runs_fused(impl, cuda) for impl in ("auto", "fused", "reference")] == [True, True, False]
    assert not runs_fused("auto", cpu) and not runs_fused("reference", cpu)


def test_layers_yield_autocasts_dtype_inside_autocast_and_their_own_outside() -> None:
    weight = torch.ones(2, 2)
    assert activation_dtype(weight) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert activation_dtype(weight) == torch.bfloat16


def bagel_loss(kernels: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(drawn noise, loss, gradients) of one tiny step."""
    config = get_variant("bagel/tiny")[1].config
    torch.manual_seed(0)
    model = bagel.BagelModel(config)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    set_kernels(model, kernels)  # type: ignore[arg-type]
    patches = torch.rand(6, config.vision.patch_dim)
    side = config.latent_stride
    target = torch.rand(3, 3 * side, 2 * side)
    one = BagelExample(patches, (2, 3), (5, 6, 7), target, (3, 2))
    batch = collate(config, [one, replace(one, text_ids=None)], [11, (5 << 40) + 4])
    draws = model.draw(batch, RandomSource(seed=3, step=7))
    loss = model(batch, draws)["reconstruction"]
    loss.backward()
    return draws.noise, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_regenerated_noise_gives_the_step_that_drawn_noise_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, expected_loss, expected = bagel_loss("auto")
    monkeypatch.setattr(bagel, "runs_fused", lambda impl, device: True)
    coordinates, loss, got = bagel_loss("auto")
    assert isinstance(drawn, Tensor) and isinstance(coordinates, PhiloxNoise)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def test_bf16_gradients_agree_with_those_of_plain_torch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, expected_loss, expected = bagel_loss("reference")
        _, loss, got = bagel_loss("auto")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    one, other = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (got, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.999
