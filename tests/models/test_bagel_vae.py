"""The FLUX autoencoder: official tensors, official names, explicit noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from reca.layers.autoencoder import GroupNormSilu
from reca.models.bagel.parity_sampling import reproduce_vae
from reca.models.bagel.vae import FluxVAE, VAEConfig, vae_slots
from reca.models.checkpoint import load_slots, named_tensors, official_shapes, save_slots
from reca.models.family import Reproduction
from reca.models.parity import compare, read_pack
from reca.profiling.launches import LaunchCounter

DATA = Path(__file__).resolve().parents[1] / "data"
PACK = DATA / "parity" / "bagel" / "vae"
CONFIG = VAEConfig(ch=32, ch_mult=(1, 2, 1), num_res_blocks=1, z_channels=4)


@pytest.fixture(scope="module")
def reproduction() -> Reproduction:
    return reproduce_vae(read_pack(PACK))


@pytest.mark.parity
def test_the_pack_is_reproduced_whole(reproduction: Reproduction) -> None:
    result = compare(read_pack(PACK), reproduction)
    assert result.failures == ()
    assert result.not_formed == {}


@pytest.mark.parity
def test_zero_padding_changes_the_latents_of_smaller_pictures(reproduction: Reproduction) -> None:
    padded, alone = (reproduction.tensors[name] for name in ("padded_moments", "single_moments.0"))
    assert (padded[:1, :, : alone.shape[2], : alone.shape[3]] - alone).abs().max() > 0.1


def test_names_and_shapes_are_those_of_the_release() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        vae = FluxVAE(config)
    slots, tensors = vae_slots(config), named_tensors(vae)
    listed = json.loads((DATA / "bagel_keys.json").read_text())["ae.safetensors"]
    assert official_shapes(slots, tensors) == {name: tuple(shape) for name, (shape, _) in listed.items()}
    assert {slot.parameter for slot in slots.values()} == set(tensors)
    assert len(slots) == 244


def test_the_official_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with torch.device("meta"):
        vae = FluxVAE(CONFIG)
    load_slots(vae, vae_slots(CONFIG), PACK / "weights.safetensors", device=torch.device("cpu"))
    save_slots(vae, vae_slots(CONFIG), tmp_path / "ae.safetensors")
    official, written = load_file(PACK / "weights.safetensors"), load_file(tmp_path / "ae.safetensors")
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in official.items())


def test_its_blocks_are_those_of_diffusers_with_each_norm_and_its_activation_in_one() -> None:
    torch.manual_seed(0)
    ours = FluxVAE(CONFIG).autoencoder
    theirs = AutoencoderKL(**ours.config)
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 16, 24)
    moments = ours.encoder(pixels)
    torch.testing.assert_close(moments, theirs.encoder(pixels))
    torch.testing.assert_close(ours.decoder(moments[:, :4]), theirs.decoder(moments[:, :4]))
    torch.autograd.grad(moments.sum(), list(ours.encoder.parameters()))  # whoever trains it may


def test_residual_blocks_launch_neither_activations_nor_divisions_of_their_own() -> None:
    with FakeTensorMode(), torch.no_grad():
        vae = FluxVAE(CONFIG)
        with LaunchCounter() as counter:
            vae.moments(torch.zeros(1, 3, 16, 16))
    operators = [launch.operator for launch in counter.launches.elements()]
    assert operators.count("reca::group_norm_silu") == 2 * 3 + 2 * 2 + 1  # levels, middle, output
    assert operators.count("aten::silu") == 0
    assert operators.count("aten::div") == 1  # of the attention in the middle


def test_a_norm_with_its_activation_is_rounded_once_to_what_its_convolution_reads() -> None:
    torch.manual_seed(0)
    norm, x = GroupNormSilu(2, 6), torch.randn(2, 6, 5, 3)
    exact = torch.nn.functional.silu(torch.group_norm(x, 2, norm.weight, norm.bias, 1e-6))
    torch.testing.assert_close(norm(x), exact)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), exact.bfloat16())


def test_logvar_is_not_clamped() -> None:
    with torch.device("meta"):
        vae = FluxVAE(CONFIG)
    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.full((1, 4, 1, 1), 24.0)], dim=1)
    latent = vae.sample(moments, torch.ones(1, 4, 1, 1))
    expected = 0.3611 * (torch.exp(torch.tensor(12.0)) - 0.1159)
    torch.testing.assert_close(latent, expected.expand(1, 4, 1, 1))


def test_noise_of_another_shape_is_refused() -> None:
    with torch.device("meta"):
        vae = FluxVAE(CONFIG)
    with pytest.raises(ValueError, match=r"noise must be \[1, 4, 2, 2\], got \[1, 4, 1, 1\]"):
        vae.sample(torch.zeros(1, 8, 2, 2), torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ch_mult": (2, 4)}, "must start with 1"),
        ({"ch_mult": ()}, "must start with 1"),
        ({"ch": 48}, "32 groups"),
    ],
)
def test_impossible_architectures_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**config)  # type: ignore[arg-type]
