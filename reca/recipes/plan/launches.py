"""Kernels that a step launches and bytes they touch, in plain torch and with our own operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from reca.config import TrainConfig
from reca.profiling.launches import Launch
from reca.recipes.plan.count import StepCount, count_step


@dataclass(frozen=True, slots=True)
class Work:
    """Launches, and operand bytes of them all, each operand read or written once per launch."""

    launches: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Compared:
    """The same work with `compute.kernels=reference` and with `auto` on a GPU."""

    reference: Work
    auto: Work


@dataclass(frozen=True, slots=True)
class PartLaunches:
    """One microbatch of a kind, or the optimizer.

    Attributes:
        name: the task, or "optimizer".
        samples, times: of a microbatch, and how many of them a step has; 0 and 1 for the optimizer.
        total: all operators.
        families: family of operators -> its share, most launches first; see `family`.
    """

    name: str
    samples: int
    times: int
    total: Compared
    families: dict[str, Compared]


@dataclass(frozen=True, slots=True)
class Official:
    """What the official code of a model launches, one kernel per operator that is no view.

    Attributes:
        work: which of its work that is.
        samples: task -> samples in it that we train on, too.
        launches, gigabytes: counted; `of` says which operands the bytes are.
        of: see above.
        source: how the numbers came about.
    """

    work: str
    samples: Mapping[str, int]
    launches: int
    gigabytes: float
    of: str
    source: str


OFFICIAL = {
    "bagel/7b-mot": Official(
        "a pack of 8 images of 1024 x 1024",
        {"reconstruction": 8},
        16_464,
        5_100,
        "all operands",
        "28 layers of 154 operators forward, again in the recomputation, and 280 backward, counted in the "
        "official code on tensors without values",
    ),
    "showo/clip-512": Official(
        "a micro-step: 1 text-to-image sample of weight 0, 2 image-to-text, 2 reconstruction",
        {"reconstruction": 2, "image_to_text": 2},
        6_284,
        334,
        "operands of all but products",
        "operators of the official code, counted on tensors without values",
    ),
}
"""Variant -> the official step, where it was counted."""


def compare_launches(
    config: TrainConfig, count: StepCount, on_progress: Callable[[str], None] = lambda line: None
) -> list[PartLaunches]:
    """Every kind of microbatch and the optimizer, with both values of `compute.kernels`.

    Args:
        config: the resolved configuration.
        count: of `config`; the other value is counted here.
        on_progress: called with a line before each part of the counting.
    """
    is_plain = config.compute.kernels == "reference"
    other = config.compute.model_copy(update={"kernels": "auto" if is_plain else "reference"})
    counted = count_step(config.model_copy(update={"compute": other}), on_progress)
    plain, wired = (count, counted) if is_plain else (counted, count)
    parts = [
        _part(one.task, one.samples, one.times, one.launches, two.launches)
        for one, two in zip(plain.microbatches, wired.microbatches, strict=True)
    ]
    return [*parts, _part("optimizer", 0, 1, plain.optimizer, wired.optimizer)]


def whole_step(parts: list[PartLaunches]) -> Compared:
    """All microbatches of a step and the optimizer."""
    return _sum([(part.times, part.total) for part in parts])


def same_samples(parts: list[PartLaunches], official: Official) -> Compared:
    """Our microbatches for the samples of the official work, as many of each as they fill."""
    whole = {
        part.name: part for part in reversed(parts)
    }  # of a task's sizes the first; a smaller rest follows
    kinds = [(whole[task], samples) for task, samples in official.samples.items() if task in whole]
    return _sum([(-(-samples // part.samples), part.total) for part, samples in kinds])


def add_up(works: list[Compared]) -> Compared:
    """All of them once."""
    return _sum([(1, work) for work in works])


def _sum(works: list[tuple[int, Compared]]) -> Compared:
    plain, wired = ([(n, getattr(w, name)) for n, w in works] for name in ("reference", "auto"))
    return Compared(_total(plain), _total(wired))


def _total(works: list[tuple[int, Work]]) -> Work:
    return Work(sum(n * w.launches for n, w in works), sum(n * w.bytes for n, w in works))


def family(operator: str) -> str:
    """Operators that differ in place or direction only share a name; `aten::mul_` is `mul`."""
    namespace, _, name = operator.partition("::")
    stem = name.removesuffix("_").removesuffix("_backward")
    if namespace == "reca":
        return f"reca {stem}"
    return "attention" if "attention" in stem else stem


def _part(
    name: str, samples: int, times: int, plain: Counter[Launch], wired: Counter[Launch]
) -> PartLaunches:
    names = {family(launch.operator) for launch in (*plain, *wired)}
    found = {one: Compared(_work(plain, one), _work(wired, one)) for one in names}
    ordered = sorted(found.items(), key=lambda item: (-_most(item[1]), item[0]))
    return PartLaunches(name, samples, times, Compared(_work(plain), _work(wired)), dict(ordered))


def _most(compared: Compared) -> int:
    return max(compared.reference.launches, compared.auto.launches)


def _work(counted: Counter[Launch], only: str | None = None) -> Work:
    chosen = [*_chosen(counted, only)]
    return Work(sum(n * x.kernels for x, n in chosen), sum(n * x.bytes for x, n in chosen))


def _chosen(counted: Counter[Launch], only: str | None) -> Iterator[tuple[Launch, int]]:
    return ((x, n) for x, n in counted.items() if only is None or family(x.operator) == only)
