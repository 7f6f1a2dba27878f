"""From a configuration to a job: only here are models, data and the engine introduced to each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reca.config import TASKS, ComputeConfig, TrainConfig
from reca.data.loader import Reject, build_loader
from reca.data.mixture import MixtureLoader, build_text_loader, open_texts, text_streams
from reca.data.sources import PACKAGE_PREFIX, Source, Subset, TextSource, open_source, split_source
from reca.engine.loop import Job
from reca.engine.state import select_device
from reca.errors import CheckpointError, ConfigError, nearest
from reca.layers.attention import set_attention_backend
from reca.layers.implementation import set_kernels
from reca.models import get_variant
from reca.models.checkpoint import PICKLED
from reca.models.family import Family, SampleOptions, Sampler, Variant
from reca.randomness import RandomSource
from reca.recipes.evaluation import Evaluation
from reca.types import StepLoader

HELD_OUT = "held_out.txt"
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready for use, and what belongs to it.

    Attributes:
        family, variant: what it is.
        model: on its device, weights loaded.
        weights: folder of the weights, which also holds the tokenizer; None for random weights.
    """

    family: Family
    variant: Variant
    model: nn.Module
    weights: Path | None

    def sampler(self) -> Sampler:
        """The family's sampler over this model."""
        return self.family.sampler(self.model, self.variant, self.weights)


def weights_folder(weights: str | None) -> Path | None:
    """Path of a configuration's weights; None for random ones.

    Raises: ConfigError if none are given; CheckpointError if they do not exist.
    """
    if weights is None:
        raise ConfigError(
            "no starting weights: give --weights FOLDER (the release's files), or weights=random"
        )
    if weights == RANDOM:
        return None
    if weights.startswith(PACKAGE_PREFIX):
        assets = Path(str(resources.files("reca.assets")))
        path = assets / weights.removeprefix(PACKAGE_PREFIX)
        shipped = [entry.name for entry in assets.iterdir() if any(entry.glob("*.safetensors"))]
        if path.name not in shipped:
            raise CheckpointError(f"reca ships no weights named {path.name!r}; {nearest(path.name, shipped)}")
        return path
    path = Path(weights)
    if not path.exists():
        raise CheckpointError(f"weights {path} do not exist; give the folder that holds the release's files")
    return path


def load_model(
    name: str, weights: str | None, compute: ComputeConfig, seed: int = 0, *, keep_dtypes: bool = False
) -> Loaded:
    """Build `family/variant` and fill it, tensor by tensor, on the device that `compute` selects.

    Frozen weights get the dtype of `compute.precision`, with `keep_dtypes` that of their file.

    Raises: ConfigError for an unknown name or device; CheckpointError if the weights do not fit.
    """
    family, variant = get_variant(name)
    device, path = select_device(compute), weights_folder(weights)
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = family.build(variant.config).to(device)
    else:
        with torch.device("meta"):
            model = family.build(variant.config)
        frozen = torch.bfloat16 if compute.precision == "bf16" else torch.float32
        family.load(model, path, device, None if keep_dtypes else frozen)
    set_attention_backend(model, compute.attention)
    set_kernels(model, compute.kernels)
    return Loaded(family, variant, model, path)


def assemble(
    config: TrainConfig,
    folder: Path,
    *,
    on_progress: Callable[[Mapping[str, Any]], None],
    on_reject: Callable[[Reject], None],
    on_start: Callable[[], None],
) -> Job:
    """Everything a run needs, from its configuration.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        on_progress: called with each logged record.
        on_reject: called once for each image that is left out.
        on_start: called once the run folder is this run's.

    Raises: ConfigError, DataError, CheckpointError before anything is written.
    """
    check_tasks(config)
    source = open_source(config.data.path)  # before the weights: a wrong folder should not cost a long load
    texts = {task: open_texts(task, stream) for task, stream in text_streams(config).items()}
    training, held_out = split_source(source, held_out_names(source, config))
    shown = Subset(held_out, range(min(config.sample.images, len(held_out))))
    loaded = load_model(config.model, config.weights, config.compute, config.seed)
    model: Any = loaded.model
    if config.timestep_shift is not None:
        if not hasattr(model, "timestep_shift"):
            raise ConfigError(f"timestep_shift would be ignored: {config.model} has no flow time; drop it")
        model.timestep_shift = config.timestep_shift
    evaluation = Evaluation(
        sampler=loaded.sampler(),
        understanding=loaded.variant.understanding,
        target=loaded.variant.target,
        source=shown,
        max_pixels=config.data.max_pixels,
        options=sample_options(config),
    )
    return Job(
        config=config,
        model=loaded.model,
        loader=build_streams(config, loaded, training, texts, on_reject),
        folder=folder,
        evaluate=evaluation,
        fingerprint={
            "data": training.fingerprint(),
            "held_out": shown.fingerprint(),
            "weights": weights_fingerprint(loaded.weights),
            **{task: text.fingerprint() for task, text in texts.items()},
        },
        on_progress=on_progress,
        on_start=on_start,
        notes=loaded.family.examine(loaded.model, loaded.variant),
    )


def check_tasks(config: TrainConfig) -> None:
    """Raise ConfigError unless the model's family trains every task of the configuration."""
    family, _ = get_variant(config.model)
    for task in config.tasks:
        if task not in family.tasks:
            raise ConfigError(
                f"{family.name} does not train {task}, only {', '.join(family.tasks)}; leave it out with "
                f"{task}=null loss_weights.{task}=null"
            )


def build_streams(
    config: TrainConfig,
    loaded: Loaded,
    images: Source,
    texts: Mapping[str, TextSource],
    on_reject: Callable[[Reject], None],
) -> StepLoader:
    """The steps of a run: those of the reconstruction stream alone, or mixed with those of other tasks.

    Args:
        config: the resolved configuration.
        loaded: the model, whose family prepares the samples.
        images: what is reconstructed.
        texts: task -> what its stream reads, for every stream of `text_streams`.
        on_reject: called once for each sample that is left out.
    """
    processor = loaded.family.processor
    first = build_loader(
        config.data,
        processor(loaded.variant, loaded.weights),
        config.seed,
        source=images,
        on_reject=on_reject,
    )
    if not texts:
        return first
    streams: dict[str, StepLoader] = {TASKS[0]: first}
    for task, stream in text_streams(config).items():
        streams[task] = build_text_loader(
            task,
            stream,
            config.data,
            processor(loaded.variant, loaded.weights, task=task),
            config.seed,
            source=texts[task],
            on_reject=on_reject,
        )
    return MixtureLoader(streams)


def sample_options(config: TrainConfig) -> SampleOptions:
    """How a run's pictures are sampled."""
    sample = config.sample
    return SampleOptions(
        steps=sample.steps,
        text_guidance=sample.text_guidance,
        image_guidance=sample.image_guidance,
        shift=sample.shift,
        seed=config.seed,
    )


def held_out_names(source: Source, config: TrainConfig) -> list[str]:
    """Images that are never trained on; the first `sample.images` of them are evaluated.

    A file `held_out.txt` in the data folder names them, one per line; else the seed chooses `sample.images`,
    but at most a fifth of all.
    """
    listed = _listed_names(config.data.path)
    if listed is not None:
        return listed
    count = min(config.sample.images, len(source) // 5)
    chosen = RandomSource(config.seed).permutation("held_out", 0, len(source))[:count]
    return [source.name(int(item)) for item in chosen.sort().values]


def _listed_names(path: str | None) -> list[str] | None:
    if path is None:
        return None
    folder = Path(path)
    if path.startswith(PACKAGE_PREFIX):
        folder = Path(str(resources.files("reca.assets"))) / path.removeprefix(PACKAGE_PREFIX)
    file = folder / HELD_OUT
    if not file.is_file():
        return None
    return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def weights_fingerprint(folder: Path | None) -> str:
    """Hash over names, sizes and both ends of the weight files; reading 30 GB whole would take minutes."""
    if folder is None:
        return RANDOM
    digest = hashlib.blake2b(digest_size=16)
    suffixes = {".safetensors", *PICKLED}
    found = [folder] if folder.is_file() else folder.rglob("*")
    files = sorted(path for path in found if path.suffix in suffixes and path.is_file())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(size - (1 << 16), 0))
            digest.update(file.read())
    return digest.hexdigest()
