"""Where compiled programs are kept, and that a second run reads them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grab_jax import compilation_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def unset():
    """JAX was told of no folder; what a test sets is taken back."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def kept():
    return jax.config.jax_compilation_cache_dir


def test_the_folder_is_the_users_own(unset, tmp_path):
    """Of this kind of CPU, which is the same every time, and for the user alone."""
    compilation_cache.use({"XDG_CACHE_HOME": str(tmp_path)})
    folder = Path(kept())
    assert folder.parent == tmp_path / "grab_jax" / "xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder == compilation_cache.folder({"XDG_CACHE_HOME": str(tmp_path)})


def test_without_xdg_it_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.folder({}).parent == tmp_path / ".cache" / "grab_jax" / "xla"


def test_variables_decide(unset, tmp_path):
    compilation_cache.use({"GRAB_JAX_CACHE": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path)})
    assert kept() == str(tmp_path / "own")
    compilation_cache.use({"GRAB_JAX_CACHE": str(tmp_path / "other")})
    assert kept() == str(tmp_path / "own"), "what JAX was told stays"


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "GRAB_JAX_CACHE"])
def test_none_keeps_nothing(unset, variable):
    compilation_cache.use({variable: "none"})
    assert kept() is None


def test_a_folder_that_cannot_be_made_is_said(unset, tmp_path, capsys):
    (tmp_path / "file").touch()
    compilation_cache.use({"GRAB_JAX_CACHE": str(tmp_path / "file" / "xla")})
    assert kept() is None
    said = capsys.readouterr().err
    assert said.startswith("grab_jax: compiled programs are not kept: ")
    assert "GRAB_JAX_CACHE" in said
    assert len(said.splitlines()) == 1


@pytest.mark.long
def test_a_second_run_compiles_nothing(tmp_path):
    """`programs` of run.json counts both kinds."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1"}
    found = []
    for run in "ab":
        args = ["--attack=span", "--num_batches=1", "--run_progress=off", f"--run_dir={tmp_path / run}"]
        subprocess.run([sys.executable, "-m", "grab_jax.main", *args], env=env, cwd=ROOT, check=True, timeout=900)
        found.append(json.loads((tmp_path / run / "run.json").read_text())["programs"])
    first, second = found
    assert first["compiled"] > 0 == first["from_cache"]
    assert second == {"compiled": 0, "from_cache": first["compiled"]}
