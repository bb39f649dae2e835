"""absl flags derived from `Config`, one per leaf; nothing else reads `FLAGS`.

Every leaf that can change a result also has a list flag `--sweep_<flag>`, which the help does not list.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from absl import flags

from grab_jax import attack_config
from grab_jax.attack_config import AttackConfig
from grab_jax.config import PLACE_ONLY, Config
from grab_jax.types import InputError

T = typing.TypeVar("T")

ATTACK = ("attack", "name")
"""The one setting that takes several values, separated by commas: a run for each."""
AUTO = "auto"
SWEEP = "sweep_"
Path = tuple[str, ...]


class Leaf(typing.NamedTuple):
    """One setting: its path in the tree, its flag, its type, value (which becomes the default) and help text.

    The `own` default of an attack is its value in a config, but no default of the flag, as the attack is not known yet.
    """

    path: tuple[str, ...]
    flag: str
    kind: Any
    default: Any
    text: str
    own: bool


def leaves(config: Any, path: Path = ()) -> Iterator[Leaf]:
    """All settings of a config, in order."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, here)
        else:
            parts = here[:-1] if field.name in ("name", "on") else here
            own, text = field.metadata.get("own", False), field.metadata["help"]
            text = f"{text}; default: {attack_config.default(field)}" if own else text
            yield Leaf(here, "_".join(parts), hints[field.name], value, text, own)


def define(config: Any, values: flags.FlagValues = flags.FLAGS) -> None:
    """Define one flag per leaf, with the leaf's value as default."""
    for leaf in leaves(config):
        _define(leaf, values)
        if isinstance(config, Config) and leaf.path[0] not in PLACE_ONLY:
            name, parser = SWEEP + leaf.flag, flags.ListParser()
            # Belongs to no module: accepted, suggested for a misspelt name, and in no help.
            values[name] = flags.Flag(
                parser, flags.CsvListSerializer(","), name, None, f"several values of {leaf.flag}"
            )


def _define(leaf: Leaf, values: flags.FlagValues) -> None:
    kind, default = _bare(leaf.kind), None if leaf.own else leaf.default
    if leaf.path == ATTACK:
        flags.DEFINE_list(leaf.flag, [leaf.default], leaf.text, flag_values=values)
        return
    if typing.get_origin(kind) is Literal:
        flags.DEFINE_enum(leaf.flag, default, typing.get_args(kind), leaf.text, flag_values=values)
        return
    definers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    definers.get(kind, flags.DEFINE_string)(leaf.flag, default, leaf.text, flag_values=values)


def _bare(kind: Any) -> Any:
    """`T | None` -> `T`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def attacks(values: flags.FlagValues = flags.FLAGS) -> tuple[str, ...]:
    """The attacks named by `--attack`, each once, in order; `("auto",)` where the choice is left to the program.

    Raises:
      InputError: a name that is no attack, none at all, or `auto` among others.
    """
    named = tuple(dict.fromkeys(name.strip() for name in values["attack"].value))
    known = attack_names()
    unknown = [name for name in named if name not in (*known, AUTO)]
    if unknown or not named or (AUTO in named and len(named) > 1):
        raise InputError(
            f"--attack={','.join(named)} is not understood; give one of {', '.join(known)}, several of them separated "
            f"by commas, or {AUTO} alone"
        )
    return named


def swept(values: flags.FlagValues = flags.FLAGS) -> dict[str, list[Any]]:
    """The values of each flag that is swept, each once, in the order of the settings.

    Several attacks beside another sweep are swept like any other setting.

    Raises:
      InputError: a value that its flag does not take, or none at all; `auto` beside a sweep.
    """
    found = {leaf.flag: _listed(leaf, values) for leaf in leaves(Config()) if _given(leaf, values) is not None}
    named = attacks(values)
    if not found:
        return {}
    if named == (AUTO,) and "attack" not in found:
        raise InputError(f"--attack={AUTO} cannot be swept; name the attacks, such as --sweep_attack=span,grab")
    if len(named) > 1 and "attack" in found:
        raise InputError("--attack names several attacks and --sweep_attack others; give one of the two")
    return {"attack": list(named), **found} if len(named) > 1 else found


def _given(leaf: Leaf, values: flags.FlagValues) -> list[str] | None:
    name = SWEEP + leaf.flag
    return values[name].value if name in values else None


def _listed(leaf: Leaf, values: flags.FlagValues) -> list[Any]:
    """The values of one swept flag, parsed as the flag itself would."""
    given = _given(leaf, values)
    items = list(dict.fromkeys(_item(leaf, item.strip(), values) for item in given))
    if not items:
        raise InputError(f"--{SWEEP}{leaf.flag} is empty; give values separated by commas")
    return items


def _item(leaf: Leaf, item: str, values: flags.FlagValues) -> Any:
    if item == "none" and type(None) in typing.get_args(leaf.kind):
        return None
    try:
        return (
            flags.EnumParser(attack_names()).parse(item)
            if leaf.path == ATTACK
            else values[leaf.flag].parser.parse(item)
        )
    except ValueError as error:
        raise InputError(f"--{SWEEP}{leaf.flag}: {item!r} is no value of --{leaf.flag} ({error})") from error


def attack_names() -> tuple[str, ...]:
    """Every attack."""
    return typing.get_args(typing.get_type_hints(AttackConfig)["name"])


def parsed(
    values: flags.FlagValues = flags.FLAGS,
    kind: type[T] = Config,
    *,
    attack: str | None = None,
    changed: Mapping[str, Any] | None = None,
) -> T:
    """The config (a tree of settings of any kind) that the parsed flags describe.

    Args:
      attack: one of several attacks; settings meant for another one are left out. By default the only one named.
      changed: values by flag, in place of those given: a cell of a sweep.

    Raises:
      InputError: a value out of range (one sentence, names the flag).
    """
    changed = changed or {}
    attack = changed.get("attack", attack)
    found = {leaf.path: changed.get(leaf.flag, values[leaf.flag].value) for leaf in leaves(kind())}
    if ATTACK in found:
        found[ATTACK] = attack or attacks(values)[0]
    if attack is not None:
        for name, (owner, other) in attack_config.FOR_ONE.items():
            found[ATTACK[0], name] = found[ATTACK[0], name] if attack == owner else other
    return build(found, kind)


def build(values: dict[Path, Any], kind: type[T] = Config) -> T:
    """A config from values by path; validation happens in the dataclasses."""

    def make(kind: type, path: tuple[str, ...]) -> Any:
        hints = typing.get_type_hints(kind)
        fields = {
            f.name: make(hints[f.name], (*path, f.name))
            if dataclasses.is_dataclass(hints[f.name])
            else values[(*path, f.name)]
            for f in dataclasses.fields(kind)
        }
        return kind(**fields)

    try:
        return make(kind, ())
    except KeyError as error:
        raise InputError(f"setting {'.'.join(error.args[0])} is missing") from error


def flagfile(config: Any) -> str:
    """The text of a flagfile that repeats this config; settings that are None are left to their default."""
    lines = []
    for leaf in leaves(config):
        if isinstance(leaf.default, bool):
            lines.append(f"--{'' if leaf.default else 'no'}{leaf.flag}")
        elif leaf.default is not None:
            lines.append(f"--{leaf.flag}={leaf.default}")
    return "\n".join(lines) + "\n"
