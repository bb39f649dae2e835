"""What a training for `--utility` depends on."""

import pytest
from test_flags import parse

from grab_jax import utility


@pytest.mark.parametrize("flag", ["dp_sampling=0.1", "dp_steps=10", "dp_delta=1e-6", "epsilon_nominal=8"])
def test_counting_another_epsilon_takes_no_training_of_its_own(flag):
    private = "--defense_clip=1", "--defense_noise_multiplier=1"
    settings = utility.settings(parse(*private))
    assert utility.settings(parse(*private, f"--defense_{flag}")) == settings
    assert utility.settings(parse("--defense_clip=1", "--defense_noise_multiplier=2")) != settings
