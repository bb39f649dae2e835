"""The arrows between modules (`architecture.md`), read off the source, and what importing the attacks costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grab_jax

ROOT = Path(grab_jax.__file__).parent
EDGE = {
    "data",
    "run",
    "report",
    "flags",
    "main",
    "folder",
    "checkpoint",
    "record",
    "plan",
    "progress",
    "about",
    "dry_run",
    "command",
    "train_prior",
    "sweep",
    "sweep_table",
    "sweep_page",
    "trackers",
    "utility",
    "sharding",
}


def imports(path, root=ROOT):
    """Dotted names a file imports anywhere in it, `from a import b` as `a.b`."""
    package = ("grab_jax", *path.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): imports(path) for path in sorted(ROOT.rglob("*.py"))}


def importers(*names):
    """Modules importing one of the packages, or something inside them."""
    hit = lambda found: any(one == name or one.startswith(name + ".") for one in found for name in names)  # noqa: E731
    return {module for module, found in MODULES.items() if hit(found)}


def test_the_reader_of_imports_sees_every_form(tmp_path):
    (tmp_path / "search").mkdir()
    file = tmp_path / "search" / "beam.py"
    file.write_text("import a.b\nfrom c import d as e\nfrom . import f\nfrom ..g import h\ndef i():\n    import j\n")
    assert imports(file, tmp_path) == {"a.b", "c.d", "grab_jax.search.f", "grab_jax.g.h", "j"}
    assert {"attacks/grab", "models/__init__", "search/beam", "types"} <= MODULES.keys()


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [
        (("flax",), {"models/*"}),
        (("orbax",), {"checkpoint"}),
        (("absl",), {"command", "flags"}),
        (("tokenizers", "datasets"), {"data"}),
        (("transformers",), {"data", "models/convert"}),
        (("safetensors",), {"data", "models/convert", "models/peft"}),
        (("torch",), {"models/convert"}),
        (("dp_accounting",), {"privacy"}),
        (("tensorboardX", "wandb"), {"trackers"}),
        (("jinja2", "matplotlib"), {"report"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_a_dependency_is_imported_in_its_place_only(packages, allowed):
    found = {"models/*" if "models/*" in allowed and m.startswith("models/") else m for m in importers(*packages)}
    assert found <= allowed
    assert found or "torch" in packages or "tokenizers" in packages  # else the rule watches nothing


def inside(folder):
    return {module: found for module, found in MODULES.items() if module.startswith(folder)}


def own(found):
    """First part of every grab_jax name: `grab_jax.models.Site` -> `models`."""
    return {name.split(".")[1] for name in found if name.startswith("grab_jax.")}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("search/", {"models", "attacks", "client", "matching", "losses", "tuning", "config", "simulate"} | EDGE),
        ("attacks/", {"simulate", "metrics"} | EDGE),
        (
            "span/",
            {"models", "attacks", "search", "client", "matching", "losses", "tuning", "config", "simulate"} | EDGE,
        ),
        ("models/", {"attacks", "search", "client", "matching", "distances", "config", "simulate"} | EDGE),
    ],
)
def test_lower_layers_do_not_know_higher_ones(folder, forbidden):
    for module, found in inside(folder).items():
        assert not own(found) & forbidden, module


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("types", set()),
        ("masks", {"types"}),
        ("losses", {"types"}),
        ("kernels/residual_norms", set()),
        ("leaves", {"types", "kernels"}),
        ("views", {"types", "leaves"}),
        ("distances", {"types", "leaves"}),
        ("tuning", {"types"}),
        ("client", {"types", "leaves", "losses", "tuning", "masks"}),
        ("local_training", {"types", "client", "masks"}),
        ("matching", {"types", "leaves", "client", "local_training", "distances", "masks", "losses"}),
    ],
)
def test_pure_modules_rest_on_those_below_them(module, allowed):
    assert own(MODULES[module]) <= allowed


def test_span_decoding_meets_models_in_one_module_only():
    """`span` is arrays only; `models.first_attention` describes a model to it, for the attacks that decode."""
    assert inside("span/")
    assert all(own(found) <= {"span"} for found in inside("span/").values())
    decoders = {
        "attacks/dager",
        "attacks/observed_span",
        "attacks/span",
        "attacks/span_evaluation",
        "attacks/span_lora",
    }
    assert importers("grab_jax.models.first_attention") == decoders
    assert {module for module in importers("grab_jax.span") if module.startswith("models/")} == {
        "models/first_attention"
    }


def test_reports_and_metrics_need_no_jax():
    assert not importers("jax") & {"report", "metrics", "sweep_table", "sweep_page", "sweep_chart"}


def test_only_the_command_line_reads_flags_or_runs():
    assert {m for m, found in MODULES.items() if "main" in own(found)} == set()
    assert {m for m, found in MODULES.items() if "run" in own(found)} <= {"main", "dry_run", "comparison", "sweep"}


def test_importing_the_attacks_is_light_and_defines_no_flag():
    code = """
import sys
from absl import flags
before = set(flags.FLAGS)
import grab_jax.attacks
heavy = [name for name in ("orbax", "torch", "transformers", "datasets", "tokenizers") if name in sys.modules]
ours = [name for name in flags.FLAGS.flags_by_module_dict() if "grab_jax" in name]
groups = ("attack", "client", "data", "known", "model", "run")
print(heavy, ours, [name for name in set(flags.FLAGS) - before if name.startswith(groups)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[] [] []"
