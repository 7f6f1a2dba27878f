"""`reca data check` and `reca data preview`: what a data set holds, and what a model will see of it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from reca.config import TASKS, CaptionConfig, ConversationConfig, DataConfig
from reca.data.mixture import open_texts
from reca.data.packing import Packer, PackLimits
from reca.data.prompts import load_prompts
from reca.data.sources import Source, TextSource, open_source
from reca.data.workers import OrderedWorkers
from reca.errors import ConfigError, DataError, nearest
from reca.images import ImageRejected, ImageSpec, load_image, resize, resized_size
from reca.models import get_variant
from reca.models.family import Variant
from reca.sheet import contact_sheet, write_png
from reca.types import Text

_SHORT_SIDES = (256, 512, 768, 1024, 2048)
_TOKENS_PER_WORD = 1.3  # of common BPE tokenizers on English
_MARKERS = 6  # start and end of the understanding image, the text and the target image
_LISTED = 20


@dataclass(frozen=True, slots=True)
class _Inspection:
    """What one file turned out to be; `reason` is empty if it can be used."""

    name: str
    reason: str
    digest: str = ""
    width: int = 0
    height: int = 0
    words: int = 0


@dataclass(frozen=True, slots=True)
class _Inspect:
    """Item -> _Inspection; runs in worker processes. `has_text`: the source is a `TextSource`."""

    source: Source
    max_pixels: int
    has_text: bool

    def __call__(self, item: int) -> _Inspection:
        name = self.source.name(item)
        try:
            data = self.source.read(item)
            image = load_image(data, max_pixels=self.max_pixels)
            text = cast(TextSource, self.source).text(item) if self.has_text else ""
        except ImageRejected as reject:
            return _Inspection(name, reject.reason)
        digest = hashlib.blake2b(data + repr(text).encode(), digest_size=16).hexdigest()
        return _Inspection(name, "", digest, image.width, image.height, _words(text))


def _words(text: Text) -> int:
    turns = ((text,),) if isinstance(text, str) else text or ()
    return sum(len(piece.split()) for turn in turns for piece in turn)


def check(
    path: str,
    model: str,
    config: DataConfig | None = None,
    *,
    task: str = TASKS[0],
    root: Path | None = None,
) -> dict[str, Any]:
    """Decode every image, read its text if the task has one, and say what can be trained on, ready for JSON.

    Args:
        path: folder of images or of tar files, or one tar file; of image_to_text the file of conversations,
            of text_to_image the folder of captioned images.
        model: `family/variant` whose image sizes decide the number of tokens.
        config: limits of a step; None takes the defaults.
        task: what is to be trained on it, one of `reca.config.TASKS`.
        root: folder that the images of conversations lie below; None takes that of `path`.

    Returns: keys `path`, `model`, `task`, `images`, `usable`, `rejected` (names and reasons), `ignored`
        (reason -> count of entries that are no samples), `duplicates` (names with equal bytes and text),
        `short_sides` (pixels -> count), `enlarged` (images below the target's smallest size), `tokens`
        (least, mean, most per image, estimated), `steps_per_epoch` and `images_per_step` (estimated),
        `fingerprint`.
    Raises: ConfigError for an unknown model or task, or a root that would be ignored; DataError if there are
        no images or none can be used.
    """
    config = DataConfig() if config is None else config
    _, variant = get_variant(model)
    source = _open(path, task, root)
    workers = OrderedWorkers(
        _Inspect(source, config.max_pixels, task != TASKS[0]),
        iter(range(len(source))),
        workers=config.workers,
        ahead=64,
        timeout_s=300.0,
    )
    with closing(workers):
        inspected = list(workers)
    prompt_tokens = _prompt_tokens(config.prompts) if task == TASKS[0] else _MARKERS
    usable: list[_Inspection] = []
    lengths: list[int] = []
    rejected: list[dict[str, str]] = []
    for image in inspected:
        tokens = prompt_tokens + round(_TOKENS_PER_WORD * image.words)
        tokens += _image_tokens(image, _views(task, variant))
        if image.reason:
            rejected.append({"name": image.name, "reason": image.reason})
        elif tokens > config.max_sample_tokens:
            reason = f"about {tokens} tokens exceed max_sample_tokens={config.max_sample_tokens}"
            rejected.append({"name": image.name, "reason": reason})
        else:
            usable.append(image)
            lengths.append(tokens)
    if not usable:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rejected[:3])
        raise DataError(f"none of the {len(source)} images in {path} can be used; {reasons}")
    steps = _count_steps(lengths, config)
    return {
        "path": path,
        "model": model,
        "task": task,
        "images": len(source),
        "usable": len(usable),
        "rejected": rejected,
        "ignored": dict(source.ignored),
        "duplicates": _duplicates(usable),
        "short_sides": _histogram([min(image.width, image.height) for image in usable]),
        "enlarged": sum(min(image.width, image.height) < variant.target.min_size for image in usable),
        "tokens": {
            "least": min(lengths),
            "mean": round(sum(lengths) / len(lengths), 1),
            "most": max(lengths),
        },
        "steps_per_epoch": steps,
        "images_per_step": round(len(usable) / steps, 2),
        "fingerprint": source.fingerprint(),
    }


def _open(path: str, task: str, root: Path | None) -> Source:
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; {nearest(task, TASKS)}")
    if root is not None and task != "image_to_text":
        raise ConfigError(f"--root would be ignored: only conversations name their images, {task} does not")
    if task == "image_to_text":
        return open_texts(task, ConversationConfig(path=path, root=root))
    if task == "text_to_image":
        return open_texts(task, CaptionConfig(path=path))
    return open_source(path)


def _views(task: str, variant: Variant) -> tuple[ImageSpec, ...]:
    """What of an image becomes tokens."""
    understanding, target = variant.understanding, variant.target
    views = {"image_to_text": (understanding,), "text_to_image": (target,)}
    return views.get(task, (understanding, target))


def _prompt_tokens(prompts: Path | None) -> int:
    lines = load_prompts(prompts)
    words = sum(len(line.split()) for line in lines) / len(lines)
    return round(_TOKENS_PER_WORD * words) + _MARKERS


def _image_tokens(image: _Inspection, specs: Sequence[ImageSpec]) -> int:
    if image.reason:
        return 0
    sizes = [(resized_size(image.width, image.height, spec), spec.stride) for spec in specs]
    return sum((height // stride) * (width // stride) for (height, width), stride in sizes)


def _count_steps(lengths: Sequence[int], config: DataConfig) -> int:
    """Steps of one pass, the last one incomplete."""
    packer: Packer[int] = Packer(
        PackLimits(config.images, config.tokens, config.max_tokens, config.max_sample_tokens)
    )
    stream, packs, exhausted = iter(lengths), 0, False
    while not exhausted or packer.waiting:
        packer.open()
        while not packer.is_full and not exhausted:
            length = next(stream, None)
            if length is None:
                exhausted = True
            else:
                packer.offer(length, length)
        packs += bool(packer.take())
    return -(-packs // config.packs)


def _duplicates(images: Sequence[_Inspection]) -> list[list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for image in images:
        groups[image.digest].append(image.name)
    return [names for names in groups.values() if len(names) > 1]


def _histogram(sides: Sequence[int]) -> dict[str, int]:
    """Pixels `from-to` -> images."""
    edges = [1, *_SHORT_SIDES]
    labels = [f"{low}-{high - 1}" for low, high in zip(edges, _SHORT_SIDES, strict=False)] + [f"{edges[-1]}+"]
    counts = Counter(sum(side >= edge for edge in _SHORT_SIDES) for side in sides)
    return {label: counts[place] for place, label in enumerate(labels)}


def render_check(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `check` found, for people."""
    (Console() if console is None else console).print(_rendered(result))


def _rendered(result: dict[str, Any]) -> RenderableType:
    tokens, rejected, duplicates = result["tokens"], result["rejected"], result["duplicates"]
    facts = Table(show_header=False, box=None)
    for label, value in (
        ("images", f"{result['images']}, {result['usable']} usable, {len(rejected)} rejected"),
        ("short side", ", ".join(f"{k} px: {n}" for k, n in result["short_sides"].items() if n)),
        ("enlarged", f"{result['enlarged']} are smaller than the target of {result['model']}"),
        ("duplicates", f"{sum(map(len, duplicates)) - len(duplicates)} in {len(duplicates)} groups"),
        ("tokens", f"about {tokens['mean']} per image ({tokens['least']} to {tokens['most']})"),
        ("steps", f"about {result['steps_per_epoch']} a pass, {result['images_per_step']} images each"),
        (
            "ignored",
            ", ".join(f"{count} {reason}" for reason, count in result["ignored"].items()) or "nothing",
        ),
    ):
        facts.add_row(label, escape(value))
    parts: list[RenderableType] = [facts]
    if rejected:
        table = Table("rejected", "because", box=None)
        for row in rejected[:_LISTED]:
            table.add_row(escape(row["name"]), escape(row["reason"]))
        parts.append(table)
    if duplicates:
        table = Table("equal files", box=None)
        for names in duplicates[:_LISTED]:
            table.add_row(escape(" = ".join(names)))
        parts.append(table)
    hidden = max(len(rejected) - _LISTED, 0) + max(len(duplicates) - _LISTED, 0)
    if hidden:
        parts.append(f"... and {hidden} more rows; --json lists all")
    return Group(*parts)


def preview(path: str, model: str, out: Path, images: int = 8) -> dict[str, Any]:
    """Draw the understanding view beside the target view of some images, evenly spread over the data.

    Returns: `sheet` (the PNG file), `images` (name and (width, height) in pixels of both views), `rejected`.
    Raises: ConfigError for an unknown model; DataError if no image can be used; DiskError for `out`.
    """
    _, variant = get_variant(model)
    source = open_source(path)
    shown: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    views: list[tuple[Image.Image, Image.Image]] = []
    for item in _spread(len(source), images):
        if len(views) == images:
            break
        try:
            image = load_image(source.read(item), max_pixels=DataConfig().max_pixels)
        except ImageRejected as reject:
            rejected.append({"name": source.name(item), "reason": reject.reason})
            continue
        pair = resize(image, variant.understanding), resize(image, variant.target)
        views.append(pair)
        shown.append({"name": source.name(item), "understanding": pair[0].size, "target": pair[1].size})
    if not views:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rejected[:3])
        raise DataError(f"none of the {len(source)} images in {path} can be used; {reasons}")
    write_png(out, _sheet(views, shown))
    return {"sheet": str(out), "images": shown, "rejected": rejected}


def _spread(length: int, count: int) -> list[int]:
    """All items, first `count` of them evenly spread, then the others in case some cannot be used."""
    first = sorted({k * length // count for k in range(count)})
    return first + sorted(set(range(length)) - set(first))


def _sheet(views: Sequence[tuple[Image.Image, Image.Image]], shown: Sequence[dict[str, Any]]) -> Image.Image:
    """One image a row, with the sizes of both views."""
    captions = []
    for row in shown:
        understanding, target = ("x".join(map(str, row[view])) for view in ("understanding", "target"))
        captions.append(f"{row['name']}   {understanding} | {target}")
    return contact_sheet(views, columns=("understanding view", "target view"), captions=captions)
