"""The photographs and weights that ship with reca, and the program that makes the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from reca.images import to_tensor
from reca.models import get_variant
from reca.models.bagel.tokenizer import read_tokenizer
from reca.randomness import RandomSource
from reca.recipes import quickstart_base
from reca.recipes.metrics import psnr
from reca.recipes.quickstart import quickstart
from reca.recipes.quickstart_photos import (
    crops,
    held_out_names,
    held_out_photos,
    photo_folder,
    pyramid,
    training_photos,
)

WEIGHTS = photo_folder().parent / "quickstart"
NOTICE = Path(__file__).parents[2] / "NOTICE"
FREE = ("public domain", "CC0 1.0", "CC BY", "CC BY-SA")


@pytest.fixture(scope="module")
def model():
    family, variant = get_variant("bagel/quickstart")
    with torch.device("meta"):
        model = family.build(variant.config)
    family.load(model, WEIGHTS, torch.device("cpu"), torch.float32)
    return model


def _targets() -> torch.Tensor:
    _, variant = get_variant("bagel/quickstart")
    return torch.stack([to_tensor(photo, variant.target) for photo in held_out_photos().values()])


def test_every_photograph_has_its_author_licence_and_origin_in_the_notice():
    lines = NOTICE.read_text(encoding="utf-8").splitlines()
    stated = dict(line.split(": ", 1) for line in lines if ".jpg: " in line)
    assert set(stated) == {path.name for path in photo_folder().glob("*.jpg")}
    for name, entry in stated.items():
        title, author, licence, origin = entry.rsplit("; ", 3)
        assert title.startswith('"') and author, name
        assert licence.startswith(FREE), f"{name}: {licence}"
        assert origin.startswith("http"), f"{name}: {origin}"


def test_every_licence_but_the_public_domain_has_its_text_named():
    text = NOTICE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if ".jpg: " in line]
    for licence in {line.rsplit("; ", 2)[1] for line in lines} - {"public domain"}:
        assert f"\n{licence}: https://creativecommons.org/" in text


def test_photographs_are_small():
    paths = list(photo_folder().glob("*.jpg"))
    assert sum(path.stat().st_size for path in paths) < 1_500_000
    for path in paths:
        with Image.open(path) as image:
            assert max(image.size) <= 256 and min(image.size) >= 64 and image.mode == "RGB", path.name


def test_held_out_photographs_are_never_trained_on():
    names = held_out_names()
    assert len(names) == len(set(names)) == 6
    trained = {photo.tobytes() for photo in training_photos()}
    assert len(trained) == len(list(photo_folder().glob("*.jpg"))) - len(names)
    assert not trained & {photo.tobytes() for photo in held_out_photos().values()}


def test_no_training_photograph_resembles_a_held_out_one():
    """Two pictures of one scene would correlate: thumbnails of different scenes do not."""

    def thumbnails(photos):
        small = [
            torch.tensor(list(photo.convert("L").resize((16, 16)).tobytes())).double() for photo in photos
        ]
        return torch.stack([(grey - grey.mean()) / grey.std() for grey in small])

    correlation = thumbnails(held_out_photos().values()) @ thumbnails(training_photos()).T / 255
    assert correlation.max() < 0.9


def test_the_weights_are_small_and_load_strictly(model):
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 7_000_000
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_autoencoder_keeps_photographs_it_has_never_seen(model):
    targets = _targets()
    with torch.no_grad():
        mean = model.vae.moments(targets).chunk(2, dim=1)[0]
        assert psnr(model.vae.decode(mean), targets).mean() > 23


def test_latents_have_about_unit_deviation(model):
    with torch.no_grad():
        latents = model.vae.moments(_targets()).chunk(2, dim=1)[0]
    assert 0.8 < latents.std().item() < 1.25


def test_understanding_tells_photographs_apart(model):
    family, variant = get_variant("bagel/quickstart")
    seen = family.sampler(model, variant, WEIGHTS).understand(list(held_out_photos().values()))
    cosines = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(seen, dim=1).T
    others = cosines[~torch.eye(len(seen), dtype=torch.bool)]
    assert others.mean() < 0.3 and others.max() < 0.9


def test_the_tokenizer_writes_any_text_and_fits_the_model():
    _, variant = get_variant("bagel/quickstart")
    text = "Kopiere das Bild, bitte! 像素 \N{CAT} <|im_start|>\n"
    ids = read_tokenizer(variant.config, WEIGHTS).encode(text)
    assert max(ids) < variant.config.llm.vocab_size
    assert not {0, 1, 2, 3} & set(ids)  # a user's text never becomes a special token
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    assert tokenizer.decode(list(ids), skip_special_tokens=False) == text


def test_crops_are_a_function_of_their_source():
    levels = pyramid(training_photos()[:3], (64, 80))
    first, again = (crops(levels, 4, 64, RandomSource(3, step=5)) for _ in range(2))
    assert first.shape == (4, 3, 64, 64) and torch.equal(first, again)
    assert first.abs().max() <= 1
    assert not torch.equal(first, crops(levels, 4, 64, RandomSource(3, step=6)))


def test_photographs_are_not_enlarged_for_crops():
    assert len(pyramid(training_photos()[:2], (64, 1000))) == 2


def test_the_program_makes_the_same_weights_twice():
    steps = {"autoencoder": 1, "understanding": 1, "generator": 1}
    (one, tokenizer), (two, again) = (quickstart_base.make_base(steps) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert tokenizer.to_str() == again.to_str() == (WEIGHTS / "tokenizer.json").read_text(encoding="utf-8")


def test_the_recipe_names_what_ships():
    config = quickstart()
    assert config.recipe == "quickstart" and config.data.path == "package:photos"
    assert config.sample.images == len(held_out_names())
    assert config.weights == f"package:{WEIGHTS.name}"
