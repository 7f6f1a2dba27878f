"""From a recipe or a YAML file plus dotted overrides to one validated TrainConfig and each value's origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from reca.config import Section, TrainConfig
from reca.errors import ConfigError, nearest
from reca.recipes import get_recipe
from reca.recipes.strict_yaml import parse_yaml

_OPEN_MAPPINGS = ("loss_weights",)  # keys below these are names, not fields


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each of its values came from.

    Attributes:
        config: validated and complete.
        origins: dotted key -> "recipe NAME", "FILE" or "command line".
    """

    config: TrainConfig
    origins: Mapping[str, str]


def resolve(recipe: str, overrides: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> Resolved:
    """Build the configuration of a run.

    Args:
        recipe: a recipe's name, or the path of a YAML file (which may say `extends: NAME`).
        overrides: `dotted.key=value` strings, later ones win.
        extra: dotted key -> value, from options such as `--data`.

    Raises: ConfigError naming the nearest valid key, the wrong value and its origin.
    """
    if recipe.endswith((".yaml", ".yml")):
        base, layer, origin = _from_file(Path(recipe))
        layers = [(layer, origin)]
    else:
        base, layers = recipe, list[tuple[list[tuple[str, Any]], str]]()
    tree = get_recipe(base)().model_dump(mode="json")
    origins = {key: f"recipe {base}" for key, _ in _leaves(tree)}
    layers.append(([_parse_override(item) for item in overrides], "command line"))
    layers.append((list((extra or {}).items()), "command line"))
    for layer, origin in layers:
        for key, value in layer:
            _assign(tree, key, value, origin)
            origins = {
                known: source for known, source in origins.items() if not f"{known}.".startswith(f"{key}.")
            }
            origins.pop(key.partition(".")[0], None)  # of a group that was null until now
            origins[key] = origin
    return Resolved(_validate(tree, origins), origins)


def read_config(path: Path) -> TrainConfig:
    """Read a run's complete `config.yaml` back. Raises ConfigError."""
    tree = parse_yaml(_read_text(path), str(path))
    return _validate(tree, {key: str(path) for key, _ in _leaves(tree)})


def config_yaml(resolved: Resolved) -> str:
    """The complete configuration as YAML, each value followed by its origin as a comment."""
    return "\n".join(_lines(resolved.config.model_dump(mode="json"), resolved.origins)) + "\n"


def _from_file(path: Path) -> tuple[str, list[tuple[str, Any]], str]:
    tree = parse_yaml(_read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe file must be a mapping of keys, got {type(tree).__name__}")
    base = tree.pop("extends", None) or tree.get("recipe")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: say which recipe this changes with `extends: NAME`")
    flat = [(key, value) for key, value in _leaves(tree) if key != "recipe"]
    return base, flat, str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}; give a recipe name or a YAML file"
        ) from error


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree; lists and empty mappings are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, tree


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must look like key=value, got {text!r}; for example optim.lr=4e-5")
    return key.strip(), parse_yaml(value, key)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also one that may be null; None for a plain value."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


def _is_optional_group(key: str) -> bool:
    field = TrainConfig.model_fields.get(key)
    return field is not None and field.default is None and _section_of(field.annotation) is not None


def _known_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _known_keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _assign(tree: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set one key. A group that was null begins with its defaults; null leaves an optional group out."""
    known = set(_known_keys(TrainConfig))
    parent, _, leaf = key.rpartition(".")
    leaves_out = value is None and (_is_optional_group(key) or parent in _OPEN_MAPPINGS)
    if key not in known and parent not in _OPEN_MAPPINGS and not leaves_out:
        if any(name.startswith(key + ".") for name in known):
            null = ", or leave it out with null" if _is_optional_group(key) else ""
            raise ConfigError(
                f"{origin}: {key!r} is a group; set one of its keys, such as {key}.{_first(known, key)}{null}"
            )
        raise ConfigError(f"{origin}: unknown key {key!r}; {_nearest_key(key, known)}")
    node = tree
    for part in parent.split(".") if parent else ():
        if node[part] is None:
            node[part] = {}
        node = node[part]
    if leaves_out and parent:
        node.pop(leaf, None)
    else:
        node[leaf] = value


def _first(known: set[str], group: str) -> str:
    return min(name for name in known if name.startswith(group + ".")).removeprefix(group + ".")


def _nearest_key(key: str, known: set[str]) -> str:
    """Match the whole dotted key, or the last part alone when the group was forgotten."""
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"did you mean {same_leaf[0]!r}?" if len(same_leaf) == 1 else nearest(key, known)


def _validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> TrainConfig:
    try:
        # JSON mode: lists become tuples and integers floats, but "8" or true is never a number.
        return TrainConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        origin = origins.get(key, "configuration")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"{origin}: unknown key {key!r}; {_nearest_key(key, set(_known_keys(TrainConfig)))}"
            ) from error
        came = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        raise ConfigError(f"{origin}: {key + ': ' if key else ''}{message}{came}") from error


def _lines(
    tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "", depth: int = 0
) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield f"{'  ' * depth}{name}:"
            yield from _lines(value, origins, f"{key}.", depth + 1)
        else:
            text = (
                yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
            )
            yield f"{'  ' * depth}{name}: {text}  # {origins.get(key, 'default')}"
