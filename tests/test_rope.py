"""The tables against the formula evaluated by hand in float64, to fp32 rounding of the angle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from checkpoints import tiny_config
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.rope import rope_magnitude, rope_table


def config_of(**overrides):
    return MiniCPMConfig.from_dict(tiny_config(hidden_size=4096, **overrides))


def scaling_of(original, short=1.0, long=2.0):
    return {
        "rope_type": "longrope",
        "short_factor": [short] * 64,
        "long_factor": [long] * 64,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize("position", [0, 1, 63, 4095])
def test_entries_follow_the_formula(position):
    config = config_of()
    cos, sin = rope_table(config, 4096)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (4096, 128)
    for i in range(64):
        angle = position / (config.rope_scaling.short_factor[i] * 10000 ** (2 * i / 128))
        # The frequency and the angle are rounded to fp32: two half units in the last place.
        tolerance = angle * 2**-23 + 1e-7
        for half in (i, i + 64):
            assert cos[position, half] == pytest.approx(math.cos(angle), abs=tolerance)
            assert sin[position, half] == pytest.approx(math.sin(angle), abs=tolerance)


def test_the_factors_follow_the_models_context_and_not_the_prompt():
    short = config_of(rope_scaling=scaling_of(65536))
    assert rope_table(short, 2)[0][1, 0] == pytest.approx(math.cos(1.0))
    raised = config_of(max_position_embeddings=131072, rope_scaling=scaling_of(65536))
    magnitude = math.sqrt(1 + math.log(2) / math.log(65536))
    assert rope_magnitude(raised) == pytest.approx(magnitude) == pytest.approx(1.0307764)
    assert rope_table(raised, 2)[0][1, 0] == pytest.approx(magnitude * math.cos(0.5))


def test_no_scaling_and_the_published_128k_table():
    plain = config_of(rope_scaling=None)
    assert rope_table(plain, 4)[1][3, 64] == pytest.approx(math.sin(3.0))
    longer = config_of().with_rope_table("128k")
    assert rope_magnitude(longer) == 1.0
    cos, _ = rope_table(longer, 131072)
    assert cos.shape == (131072, 128)
    assert cos[1, 0] == pytest.approx(math.cos(1 / 0.9982316082870437), abs=1e-6)


def test_a_context_beyond_the_table_is_refused():
    with pytest.raises(UsageError, match="131072 tokens exceeds the rope table's 65536"):
        rope_table(config_of(), 131072)
