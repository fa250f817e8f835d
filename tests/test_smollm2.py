"""A real trained model through this package: the tokens that Hugging Face transformers gives.

Both read SmolLM2-135M-Instruct.Q4_1.gguf, restored to fp32. How the expected tokens were made is in
tests/data/make_smollm2_greedy.py and recorded beside them. ``make demo-smollm2`` fetches the model;
FD_MINICPM41_DEMO_DIR names another folder than .demo.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import pytest

from fd_minicpm41.cli.demo_smollm2 import CHECKPOINT, GGUF_SHA256, TEXT
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.model import ForCausalLM
from fd_minicpm41.reference.sampling import generate
from fd_minicpm41.reference.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("FD_MINICPM41_DEMO_DIR", ROOT / ".demo")) / CHECKPOINT
RECORD = json.loads((ROOT / "tests/data/smollm2_greedy.json").read_text("utf-8"))
CASES = {case["name"]: case for case in RECORD["cases"]}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is not there: `make demo-smollm2` fetches it"
)


@pytest.fixture(scope="module")
def model() -> ForCausalLM:
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER)


def test_the_record_is_of_the_demos_model() -> None:
    assert RECORD["sha256"] == GGUF_SHA256
    assert len(CASES) >= 5
    assert max(len(case["prompt_ids"]) for case in CASES.values()) >= 2000
    assert all(len(case["output_ids"]) == 64 for case in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_prompts_have_the_same_tokens(tokenizer: Tokenizer, name: str) -> None:
    case = CASES[name]
    if name == "long":
        text = resources.files("fd_minicpm41").joinpath(f"data/{TEXT}").read_text("utf-8").rstrip()
    else:
        text = case["prompt"]
    if case["kind"] == "chat":
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    else:
        ids = tokenizer.encode(text)
    assert ids == case["prompt_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(
    model: ForCausalLM, tokenizer: Tokenizer, name: str
) -> None:
    """No end token stops either side, so that all 64 are compared."""
    case = CASES[name]
    cache = model.new_cache(len(case["prompt_ids"]) + 64)
    output_ids = list(generate(model, cache, case["prompt_ids"], 64))
    assert output_ids == case["output_ids"], (
        f"{tokenizer.decode(output_ids)!r} is not {case['output_text']!r}"
    )
