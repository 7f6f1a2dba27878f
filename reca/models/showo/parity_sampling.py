"""Parity packs of the image tokenizer and of the sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from reca.models.checkpoint import load_slots
from reca.models.family import Pack, Reproduction
from reca.models.showo.batch import MaskedExample, TextToImageBatch, collate_masked
from reca.models.showo.checkpoint import magvit_slots
from reca.models.showo.config import MagvitConfig
from reca.models.showo.magvit import Magvit
from reca.models.showo.model import ShowoModel
from reca.models.showo.parity_training import attention_mask, load_pack_model, official, record
from reca.models.showo.sampler import UNKNOWN, Canvas, Step, fill
from reca.models.showo.sequence import Block, text_to_image
from reca.models.showo.transformer import Layout


@torch.no_grad()
def reproduce_tokenizer(pack: Pack) -> Reproduction:
    """Case `magvit`: pixels to codes and back, square and not."""
    model = Magvit(MagvitConfig.from_official(pack.description["config"]["magvit"]))
    path = pack.folder / "weights.safetensors"
    load_slots(model, magvit_slots(model, ""), path, device=torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    for name in ("a", "b"):
        pixels = pack.inputs[f"pixels_{name}"]
        encoder = model.encoder
        watched = {
            f"enc.level{index}": encoder.get_submodule(f"down.{index}.block.{count - 1}")
            for index, count in enumerate(model.config.encoder_blocks)
        }
        with record({**watched, "enc.mid_attn": encoder.mid.attn_1}) as outputs:
            latents = model.latents(pixels)
        codes = model.codes(latents)
        height, width = latents.shape[-2:]
        quantized = model.table[codes].transpose(1, 2).unflatten(2, (height, width))
        decoded = model.decode(codes, height, width)
        stages = {**outputs, "z": latents, "z_q": quantized, "codes": codes, "decoded": decoded}
        tensors |= {f"{name}.{stage}": value for stage, value in stages.items()}
    codes = pack.inputs["codes_random"]
    side = round(codes.shape[1] ** 0.5)
    tensors["random.decoded"] = model.decode(codes, side, side)
    return Reproduction(tensors)


@torch.no_grad()
def reproduce_generation(pack: Pack) -> Reproduction:
    """Case `generate`: every step of the guided sampler, from nothing and from known codes."""
    model, training = load_pack_model(pack), pack.description["config"]["training"]
    config, inputs = model.config, pack.inputs
    runs: list[list[Step]] = []
    texts = [
        tuple(ids[:length].tolist())
        for ids, length in zip(inputs["prompt_ids"], inputs["prompt_len"], strict=True)
    ]
    for index, text in enumerate(texts):
        full, without = (Canvas(model, _batch(model, words)) for words in (text, ()))

        def draws(step: int, index: int = index) -> tuple[Tensor, Tensor]:
            return inputs["noise.exp"][step, index], inputs["noise.u"][step, index]

        codes = torch.where(inputs["init_codes"][index] < 0, UNKNOWN, inputs["init_codes"][index])
        steps = fill(
            full,
            without,
            codes,
            steps=training["generation_timesteps"],
            guidance=1 + training["guidance_scale"],
            draws=draws,
        )
        runs.append(list(steps))
    dropped: list[tuple[int, ...]] = [()] * len(texts)
    layout = Layout.of([*_complete(model, texts), *_complete(model, dropped)])
    packed = official(layout, layout.token_ids)
    starts = packed.shape[1] - 1 - config.num_codes

    def ids(known: Tensor) -> Tensor:
        """[2 * pictures, length]: both halves of the batch, around codes [pictures, codes]."""
        image = torch.where(known == UNKNOWN, config.special.mask, known + config.special.codes)
        middle = torch.cat([image, image])
        return torch.cat([packed[:, :starts], middle, packed[:, -1:]], dim=1)

    def stacked(values: list[list[Tensor]]) -> Tensor:
        """[pictures][steps] -> [steps, pictures, ...]."""
        return torch.stack([torch.stack(picture) for picture in values], dim=1)

    before = stacked([[step.before for step in run] for run in runs])
    first = ids(before[0])
    tensors = {
        "cond_input_ids": first[: len(texts)],
        "uncond_input_ids": first[len(texts) :],
        "model_input_ids": torch.stack([ids(known) for known in before]),
        "attn": attention_mask(layout),
        "final_codes": torch.stack([run[-1].sampled for run in runs]),
        "cond_logits": stacked([[step.full for step in run] for run in runs]),
        "uncond_logits": stacked(
            [[step.without for step in run if step.without is not None] for run in runs]
        ),
        "probs": stacked([[step.probabilities for step in run] for run in runs]),
        "masking": stacked([[step.masked for step in run] for run in runs]).to(torch.uint8),
    }
    return Reproduction(tensors)


def _batch(model: ShowoModel, text: tuple[int, ...]) -> TextToImageBatch:
    example = MaskedExample(
        text=text,
        pixels=torch.empty(3, 0, 0),
        num_masked=model.config.num_codes,
        is_reconstruction=False,
        num_tokens=0,
    )
    batch = collate_masked(model.config, [example], [0], text_length=model.config.generation_text)
    assert isinstance(batch, TextToImageBatch)
    return batch


def _complete(model: ShowoModel, texts: list[tuple[int, ...]]) -> list[tuple[Block, ...]]:
    length = model.config.generation_text
    return [text_to_image(model.config, text, length=length, is_complete=True) for text in texts]
