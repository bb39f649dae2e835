"""Several attacks on the same client batches: one after another, each in its own folder, all on one page.

`--attack=span,grab` runs these; `--attack=auto` runs what the problem allows, the strongest evidence first, and stops
where nothing is left to show. Killed, the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from grab_jax import dry_run, flags, report, run, sharding, sweep_table
from grab_jax import folder as folders
from grab_jax.attacks import ATTACKS
from grab_jax.config import Config
from grab_jax.types import InputError

Configure = Callable[[str], Config]
"""The settings of one attack by its name; raises InputError where they do not fit it."""

STRONGEST_FIRST = ("span", "dager", "grab")
"""What `auto` tries: proofs, then a search."""

LISTED = "comparison.json"


def start(names: Sequence[str], configure: Configure) -> Path | None:
    """Run, print the plan or the state of, or rebuild the page of several attacks, as `mode` and `dry_run` say.

    Raises:
      InputError: several processes are to share this; the order of attacks is not known to each of them.
    """
    automatic = tuple(names) == (flags.AUTO,)
    chosen, skipped = allowed(configure) if automatic else ([configure(name) for name in names], {})
    if sharding.initialize(chosen[0].run.distributed).several:
        raise InputError(
            f"--attack={','.join(names)} goes from attack to attack in one process, and this is one of several; give "
            "--sweep_attack instead, or --run_distributed=off in one process"
        )
    if chosen[0].mode == "report":
        print(rebuild(chosen[0]))
    elif chosen[0].mode == "status":
        print(status(chosen[0]))
    elif chosen[0].dry_run:
        for config in chosen:
            print(f"--attack={config.attack.name}\n{dry_run.describe(config)}")
        _say(skipped)
    else:
        return run_all(chosen, skipped, "+".join(names), enough=automatic)
    return None


def allowed(configure: Configure) -> tuple[list[Config], dict[str, str]]:
    """The attacks that the settings allow, the strongest evidence first, and why the others are skipped.

    Raises:
      InputError: no attack takes these settings; the sentence is that of the first one.
    """
    chosen, skipped = [], {}
    for name in STRONGEST_FIRST:
        try:
            config = configure(name)
        except InputError as error:
            skipped[name] = str(error)
            continue
        reason = getattr(ATTACKS[name], "hopeless", lambda _config: None)(config)
        if reason:
            skipped[name] = reason
        else:
            chosen.append(config)
    if not chosen:
        raise InputError(next(iter(skipped.values())))
    if chosen[0].attack.name == "span":
        chosen = [_handed_over(config) for config in chosen]
    return chosen, skipped


def _handed_over(config: Config) -> Config:
    if config.attack.name != "grab" or "true" in (config.attack.masks, config.attack.tokens):
        return config
    return dataclasses.replace(config, attack=dataclasses.replace(config.attack, init="span"))


def run_all(chosen: Sequence[Config], skipped: dict[str, str], name: str, *, enough: bool) -> Path:
    """Attack after attack; the page of the first one shows all of them.

    Args:
      chosen: one config per attack, equal in everything else.
      skipped: attacks that were not chosen, and why.
      name: of the comparison, for its folder.
      enough: stop as soon as every sentence is proven.
    """
    os.umask(0o077)
    base = Path(chosen[0].run.dir or folders.default_folder(chosen[0], name))
    folders.begin_several(base, LISTED)
    _say(skipped)
    done: list[str] = []
    folders.write_json(base / LISTED, {"attacks": done, "skipped": skipped})
    for config in chosen:
        attack = config.attack.name
        if enough and done and _all_proven(base / done[-1]):
            skipped = {**skipped, attack: f"{done[-1]} proved every sentence"}
            _say({attack: skipped[attack]})
            continue
        print(f"attack {attack}")
        run.run(_placed(config, base, done))
        done.append(attack)
        folders.write_json(base / LISTED, {"attacks": done, "skipped": skipped})
    folders.write_json(base / LISTED, {"attacks": done, "skipped": skipped})
    page = _page(base, chosen[0].report.others)
    print(f"all attacks: {page}")
    return base


def _placed(config: Config, base: Path, done: Sequence[str]) -> Config:
    """The run of one attack: in a folder of its own, the earlier ones beside it."""
    beside = [*(str(base / name) for name in done), *config.report.others]
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(base / config.attack.name)),
        report=dataclasses.replace(config.report, beside=",".join(beside) or None),
    )


def _all_proven(folder: Path) -> bool:
    found = json.loads((folder / "summary.json").read_text())
    return bool(found["n_sentences"]) and found.get("certified") == found["n_sentences"]


def _say(skipped: dict[str, str]) -> None:
    for name, reason in skipped.items():
        print(f"attack {name} not run: {reason}")


def is_folder(config: Config) -> bool:
    """Whether `--run_dir` is the folder of several attacks."""
    return config.run.dir is not None and (Path(config.run.dir) / LISTED).is_file()


def _folder(config: Config) -> Path:
    if not is_folder(config):
        raise InputError(f"--run_dir={config.run.dir} holds no {LISTED}; give the folder of several attacks")
    return Path(config.run.dir)


def status(config: Config) -> str:
    """`--mode=status` for the folder of several attacks: the finished batches of each that has begun.

    Raises:
      InputError: `--run_dir` is no such folder.
    """
    return "\n".join(sweep_table.status(path.parent) for path in sorted(_folder(config).glob("*/run.json")))


def rebuild(config: Config) -> Path:
    """`--mode=report` for the folder of several attacks: every page again, and the one of all.

    Raises:
      InputError: `--run_dir` is no such folder.
    """
    base = _folder(config)
    done = json.loads((base / LISTED).read_text())["attacks"]
    for i, name in enumerate(done):
        attack = dataclasses.replace(config.attack, name=name)
        run.rebuild(_placed(dataclasses.replace(config, attack=attack), base, done[:i]))
    return _page(base, config.report.others)


def _page(base: Path, others: Sequence[str]) -> Path:
    listed = json.loads((base / LISTED).read_text())
    first, *rest = (base / name for name in listed["attacks"])
    return report.render(first, [*rest, *others], page=base / "report.html", skipped=listed["skipped"])
