"""Harmon's sampler: pictures that ignore their batch, guidance, schedules; and the ids of its template."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError, ConfigError
from reca.models.family import SampleOptions
from reca.models.harmon.config import VARIANTS, HarmonConfig, SpecialTokens
from reca.models.harmon.context import Canvas, read_prefix
from reca.models.harmon.diffusion import Schedule
from reca.models.harmon.model import HarmonModel
from reca.models.harmon.sampler import HarmonSampler, Plan, Randomness, denoise, masked_after, picture_steps
from reca.models.harmon.tokenizer import read_template
from reca.models.tokenizer import QWEN2_WORDS

VARIANT = VARIANTS["tiny"]
CONFIG: HarmonConfig = VARIANT.config
OPTIONS = SampleOptions(steps=4, text_guidance=2.0)
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model() -> HarmonModel:
    """Weights at which prompts matter, and the diffusion of untrained weights does not leave the range."""
    torch.manual_seed(0)
    built = HarmonModel(CONFIG)
    torch.nn.init.normal_(built.embed_tokens.weight, std=1.0)
    torch.nn.init.normal_(built.diffusion_head.output.weight, std=1e-5)
    torch.nn.init.normal_(built.diffusion_head.modulation.weight, std=0.5)
    return built


@pytest.fixture(scope="module")
def sampler(model: HarmonModel) -> HarmonSampler:
    return HarmonSampler(model, VARIANT)


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.array(first), np.array(second))


def randomness(tokens: int, steps: int = 5) -> Randomness:
    return Randomness.of(3, torch.tensor([7]), tokens, 16, steps)


def test_a_picture_depends_on_prompt_number_and_seed_alone(sampler: HarmonSampler) -> None:
    both = sampler.text_to_image(["a cat", "a dog"], SIZE, OPTIONS)
    alone = sampler.text_to_image(["a dog"], SIZE, dataclasses.replace(OPTIONS, first_index=1))
    assert both[0].size == (48, 32) and same(both[1], alone[0])
    assert not same(both[0], both[1])
    (other,) = sampler.text_to_image(["a cat"], SIZE, dataclasses.replace(OPTIONS, seed=1))
    assert not same(both[0], other)


def test_reconstructions_have_the_size_of_training_and_ignore_their_batch(sampler: HarmonSampler) -> None:
    pictures = sampler.reconstruct(photographs(), ["describe", "describe"], OPTIONS)
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    options = dataclasses.replace(OPTIONS, first_index=1)
    assert same(sampler.reconstruct(photographs()[1:], ["describe"], options)[0], pictures[1])


def test_understanding_is_one_vector_per_image(sampler: HarmonSampler) -> None:
    pooled = sampler.understand(photographs())
    assert pooled.shape == (2, 64) and pooled.dtype == torch.float32
    assert torch.equal(sampler.understand(photographs()[1:])[0], pooled[1])
    assert sampler.understand([]).shape == (0, 64)


def test_what_cannot_be_made_is_refused(sampler: HarmonSampler) -> None:
    with pytest.raises(ConfigError, match="harmon cannot edit"):
        sampler.edit(photographs(), ["add a hat"] * 2, OPTIONS)
    with pytest.raises(ConfigError, match="sides must be multiples of 16 pixels"):
        sampler.text_to_image(["x"], (32, 40), OPTIONS)
    with pytest.raises(ValueError, match=r"steps must be in 2\.\.1000, got 1"):
        Schedule.respaced(1)


def test_every_token_appears_once_and_ever_more_at_a_time(model: HarmonModel) -> None:
    grid, plan = (4, 6), Plan(5, 1.0)
    with torch.no_grad():
        canvas = Canvas(model, [read_prefix(model, [1, 2, 3])], grid)
        steps = list(picture_steps(canvas, randomness(24), plan))
    assert sorted(torch.cat([step.predicted for step in steps]).tolist()) == list(range(24))
    kept, masked = [], 24
    for iteration in range(5):
        masked = masked_after(iteration, 5, 24, masked)
        kept.append(masked)
    assert kept == [22, 19, 14, 7, 1]
    assert [len(step.predicted) for step in steps] == [2, 3, 5, 7, 7]
    for step in steps:
        changed = (step.before != step.after).any(dim=1).nonzero().flatten()
        assert set(changed.tolist()) == set(step.predicted.tolist())
    # the order is consumed from its end
    assert set(steps[0].predicted.tolist()) == set(randomness(24).order[22:].tolist())


def test_more_iterations_than_tokens_are_cut(model: HarmonModel) -> None:
    with torch.no_grad():
        canvas = Canvas(model, [read_prefix(model, [1, 2, 3])], (2, 2))
        steps = list(picture_steps(canvas, randomness(4), Plan(50, 1.0)))
    assert [len(step.predicted) for step in steps] == [1, 1, 1, 1]


def test_without_guidance_the_unconditional_pass_is_spared_and_changes_nothing(model: HarmonModel) -> None:
    head, schedule = model.diffusion_head, Schedule.respaced(5)
    torch.manual_seed(1)
    condition, drawn = torch.randn(2, 6, 48), randomness(6)
    arguments = (drawn.initial, drawn.steps, schedule)
    with torch.no_grad():
        plain = denoise(head, condition[:1], *arguments, guidance=1.0, temperature=1.0)
        one = denoise(head, condition, *arguments, guidance=1.0, temperature=1.0)
        three = denoise(head, condition, *arguments, guidance=3.0, temperature=1.0)
        cold = denoise(head, condition, *arguments, guidance=1.0, temperature=0.0)
    # values of an untrained head reach 3e4, where fp32 is spaced by 0.002
    torch.testing.assert_close(one, plain, rtol=0, atol=0.05)
    assert (three - one).abs().max() > 1 and (cold - one).abs().max() > 1


def test_a_respaced_schedule_keeps_both_ends_and_the_signal_of_its_times() -> None:
    full, few = Schedule.full(), Schedule.respaced(100)
    assert few.times[0] == 0 and few.times[-1] == 999 and len(few.times) == 100
    assert few.times[1] == round(999 / 99)
    torch.testing.assert_close(few.table[:, :4], full.table[few.times][:, :4], rtol=1e-5, atol=1e-7)
    everything = Schedule.respaced(1000)
    torch.testing.assert_close(everything.table, full.table, rtol=1e-4, atol=1e-6)


def test_the_schedule_preserves_variance_and_its_posterior_is_exact() -> None:
    at = Schedule.full().at(torch.tensor([1, 500, 998]))
    torch.testing.assert_close(at.signal**2 + at.noise**2, torch.ones(3, 1))
    # without noise, x_t = signal * x_0 has its posterior mean at the signal level of t - 1
    before = Schedule.full().at(torch.tensor([0, 499, 997]))
    clean = torch.full((3, 1), 2.0)
    torch.testing.assert_close(at.mean(clean, at.signal * clean), before.signal * clean, rtol=1e-4, atol=1e-5)
    assert float(Schedule.full().table[999, 7]) == pytest.approx(math.log(0.999), rel=1e-6)


# The template


def tokenizer_folder(folder: Path, special: SpecialTokens, merges: list[tuple[str, str]]) -> Path:
    """A byte-level BPE with Qwen's way of cutting words, `user` and `assistant` being words of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    for merge in merges:
        vocabulary.setdefault("".join(merge), len(vocabulary))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    description = json.loads(tokenizer.to_str())
    names = {"<|im_start|>": special.im_start, "<|im_end|>": special.im_end}
    description["added_tokens"] = [{"content": name, "id": index} for name, index in names.items()]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder


USER = [("u", "s"), ("e", "r"), ("us", "er")]
NEWLINES = [("Ċ", "Ċ")]
FILES = dataclasses.replace(CONFIG, tokenizer="files", image_index=3, special=SpecialTokens(300, 301, 302))
FILES = dataclasses.replace(FILES, llm=dataclasses.replace(FILES.llm, vocab_size=310))


def test_two_newlines_are_one_token_in_training_and_special_tokens_cannot_be_spelled(tmp_path: Path) -> None:
    template = read_template(FILES, tokenizer_folder(tmp_path, FILES.special, USER + NEWLINES))
    (user,) = template.tokenizer.encode("user")
    (newline,), (two,) = template.tokenizer.encode("\n"), template.tokenizer.encode("\n\n")
    plain, training = template.instruction("Hi"), template.instruction("\nHi")
    assert plain[:3] == (300, user, newline) and training[:3] == (300, user, two)
    assert template.instruction_after_image("Hi")[:4] == (300, user, newline, newline)
    assert plain[-len(template.tokenizer.encode("assistant")) - 4 :][:3] == (301, newline, 300)
    assert template.instruction("<|im_end|>").count(301) == 1
    assert template.answer("ok")[-1] == 301


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, SpecialTokens(304, 301, 302), USER + NEWLINES)
    with pytest.raises(CheckpointError, match=r"gives <\|im_start\|> the id 304, the model expects 300"):
        read_template(FILES, folder)
    tokenizer_folder(tmp_path, FILES.special, NEWLINES)
    with pytest.raises(CheckpointError, match="puts 6 tokens before an image, the model expects 3"):
        read_template(FILES, folder)
    small = dataclasses.replace(FILES, llm=dataclasses.replace(FILES.llm, vocab_size=200))
    with pytest.raises(CheckpointError, match=r"has ids up to \d+, the model 200 embeddings"):
        read_template(small, folder)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer is missing"):
        read_template(FILES, None)
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        read_template(FILES, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        read_template(FILES, tmp_path)
