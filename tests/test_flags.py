"""Flags: one per setting, and a flagfile that says everything again."""

import dataclasses
import re
from pathlib import Path

import pytest
from absl import flags as absl_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from grab_jax import flags
from grab_jax.attack_config import AttackConfig
from grab_jax.config import ClientConfig, Config, DataConfig, ModelConfig, RunConfig
from grab_jax.types import InputError

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "experiments").glob("*.flags"))


def parse(*args):
    """The config of a command line, with flags of its own."""
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    assert values(["grab_jax", *map(str, args)]) == ["grab_jax"]
    return flags.parsed(values)


def again(config, folder):
    path = folder / "flags.txt"
    path.write_text(flags.flagfile(config))
    return parse(f"--flagfile={path}")


def test_one_flag_per_leaf():
    """Counted by hand from the dataclasses: every field that is not a group."""
    count = lambda config: sum(  # noqa: E731
        count(value) if dataclasses.is_dataclass(value) else 1 for value in vars(config).values()
    )
    found = [leaf.flag for leaf in flags.leaves(Config())]
    assert len(found) == len(set(found)) == count(Config())
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name) for name in found)


def test_agreed_names():
    names = {leaf.flag for leaf in flags.leaves(Config())}
    agreed = """mode attack model data num_batches batch_size client_dropout client_frozen attack_rounds attack_steps
        attack_restarts seed run_dir dry_run"""
    assert set(agreed.split()) <= names


def test_every_flag_is_explained():
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    for leaf in flags.leaves(Config()):
        assert len(values[leaf.flag].help) > 8, leaf.flag


def test_defaults():
    assert parse() == Config()


def test_values_reach_their_leaf():
    given = """--attack_clip=0.5 --model_num_labels=3 --noreport_redact --client_frozen=none --data=x.txt --dry_run
        --attack_distance=cosine --run_memory_gb=2 --seed=7"""
    config = parse(*given.split())
    assert config.attack.clip == 0.5
    assert config.model.num_labels == 3
    assert config.report.redact is False
    assert config.client.frozen == "none"
    assert config.data.name == "x.txt"
    assert config.dry_run is True
    assert config.attack.distance == "cosine"
    assert config.run.memory_gb == 2.0
    assert config.seed == 7


CHANGED = Config(
    mode="report",
    model=ModelConfig(name="a folder/with spaces", revision="main", num_labels=5),
    data=DataConfig(name="Ærø.jsonl", split="test", start=3, max_length=17),
    client=ClientConfig(dropout=0.1 + 0.2, frozen="none"),
    attack=AttackConfig(clip=1e-300, chunk=3, schedule="linear", masks="off", tokens="true", mask_start=1 / 3),
    run=RunConfig(dir="runs/x y", memory_gb=1.5, checkpoint_minutes=0.001),
    seed=2**32 - 1,
    dry_run=True,
)


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["default", "changed"])
def test_flagfile_repeats_a_config(config, tmp_path):
    assert again(config, tmp_path) == config


def test_every_bool_both_ways(tmp_path):
    for leaf in flags.leaves(Config()):
        if leaf.kind is bool:
            for value in ("", "no"):
                config = parse(f"--{value}{leaf.flag}", "--attack=span")  # grab must be told the rate
                assert again(config, tmp_path) == config


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
words = st.text("abcÆ-_./: =#'\"", min_size=1).filter(lambda text: text == text.strip())


@settings(max_examples=60, deadline=None)
@given(
    lr=positive, clip=st.none() | positive, rate=st.floats(0, 1, exclude_max=True), name=words,
    chunk=st.none() | st.integers(1, 10**9), seed=st.integers(0, 2**32 - 1), labels=st.booleans(),
)  # fmt: skip
def test_flagfile_repeats_any_value(tmp_path_factory, lr, clip, rate, name, chunk, seed, labels):
    config = dataclasses.replace(
        Config(seed=seed, data=DataConfig(name=name), client=ClientConfig(dropout=rate)),
        attack=AttackConfig(lr=lr, clip=clip, chunk=chunk),
        known=dataclasses.replace(Config().known, labels=labels),
    )
    assert again(config, tmp_path_factory.getbasetemp()) == config


def test_what_is_not_given_is_the_attacks_own():
    """Settings of the papers (DLG and TAG as LAMP compares with them), and the flagfile says the values used."""
    own = {
        "grab": {"rounds": 5, "steps": 2000, "lr": 0.01, "distance": "l2+l1", "masks": "learn", "weight_decay": 0.01},
        "dlg": {"rounds": 1, "steps": 2500, "lr": 0.1, "decay": 1, "distance": "squared", "masks": "off", "moves": 0},
        "tag": {"steps": 2500, "lr": 0.1, "distance": "squared+l1", "l1": 0.01, "weight_decay": 0, "sweeps": 0},
        "lamp": {"steps": 2000, "lr": 0.01, "decay": 0.89, "decay_every": 50, "distance": "cosine", "candidates": 500,
                 "permutations": 500, "moves": 200, "moves_every": 75, "moves_after": 0.1, "norm_weight": 1,
                 "prior_weight": 0.2, "prior": "none", "keep": "best", "vocabulary": "words", "masks": "off"},
    }  # fmt: skip
    for name, expected in own.items():
        config = parse(f"--attack={name}")
        assert {setting: getattr(config.attack, setting) for setting in expected} == expected
        assert config.attack == AttackConfig(name=name)
        assert re.search(rf"^--attack_steps={expected['steps']}$", flags.flagfile(config), re.M)


def test_what_is_given_wins_over_the_attacks_own(tmp_path):
    config = parse("--attack=dlg", "--attack_lr=0.02", "--attack_masks=learn", "--attack_candidates=0")
    assert (config.attack.lr, config.attack.masks, config.attack.candidates) == (0.02, "learn", 0)
    assert config.attack.steps == 2500
    assert again(config, tmp_path) == config


def test_lamps_weights_follow_its_distance():
    weights = lambda *args: (lambda a: (a.norm_weight, a.prior_weight))(parse("--attack=lamp", *args).attack)  # noqa: E731
    assert weights() == (1.0, 0.2)
    assert weights("--attack_distance=squared+l1") == (25.0, 60.0)
    assert weights("--attack_distance=squared+l1", "--attack_prior_weight=3") == (25.0, 3.0)


def test_the_bundled_prior_is_the_models_own():
    judge = lambda model: parse("--attack=lamp", "--attack_prior=builtin", f"--model=builtin:{model}").attack.prior  # noqa: E731
    assert judge("bert-mini") == "builtin:bert-mini-prior"
    assert judge("gpt2-mini") == "builtin:gpt2-mini"
    with pytest.raises(InputError, match=r"not for --model=some/model; train a prior .* grab_jax.train_prior"):
        parse("--attack=lamp", "--attack_prior=builtin", "--model=some/model")


def test_the_help_says_every_attacks_own_default():
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    assert values["attack_steps"].help.endswith("default: 2000 (grab, lamp); 2500 (dlg, tag)")


BAD = """num_batches=0 batch_size=0 seed=-1 seed=4294967296 data_start=-1 data_max_length=3 client_dropout=1
    client_dropout=-0.1 client_dropout=nan client_epochs=0 client_local_batch=-1 client_lr=0 client_momentum=1
    client_weight_decay=-1 attack_rounds=0 attack_steps=0 attack_restarts=0 attack_decay_every=0
    attack_beam=0 attack_candidates=-1 attack_permutations=-1 attack_sweeps=-1 attack_l1=-1 attack_weight_decay=-1
    attack_lr=0 attack_decay=0 attack_clip=0 attack_chunk=0 attack_together=0 attack_mask_start=1.1 attack_moves=-1
    attack_moves_every=0 attack_moves_after=2 attack_norm_weight=-1 attack_prior_weight=-1
    attack_dager_near=0 attack_dager_near=1 attack_dager_whole=-1 attack_dager_budget=0 attack_dager_spare=0
    run_group=0 run_memory_gb=0 run_checkpoint_minutes=-1 utility_rounds=0 utility_clients=0 utility_lr=0
    utility_held_out=1"""


@pytest.mark.parametrize("flag", BAD.split())
def test_out_of_range(flag):
    with pytest.raises(InputError) as caught:
        parse(f"--{flag}")
    name, value = flag.split("=")
    said = str(caught.value)
    assert said.startswith(f"--{name}=")
    assert "expected" in said
    assert float(said.removeprefix(f"--{name}=").split(":")[0]) == pytest.approx(float(value), nan_ok=True)


@pytest.mark.parametrize("flag", ["attack_rounds=x", "client_frozen=some", "mode=run", "bogus=1"])
def test_unparsable(flag):
    with pytest.raises(absl_flags.Error, match=flag.split("=")[0]):
        parse(f"--{flag}")


def test_build_names_what_is_missing():
    values = {leaf.path: leaf.default for leaf in flags.leaves(Config())}
    assert flags.build(values) == Config()
    del values["attack", "lr"]
    with pytest.raises(InputError, match=r"attack\.lr"):
        flags.build(values)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_parse(preset):
    """And each of their settings is known; a preset changes something."""
    assert parse(f"--flagfile={preset}") != Config()


def test_there_are_presets():
    assert {"quickstart", "grab_practical", "grab_benchmark"} <= {path.stem for path in PRESETS}
