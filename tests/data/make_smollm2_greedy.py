"""Records the greedy tokens of SmolLM2-135M-Instruct as Hugging Face transformers computes them.

Run in an environment of its own, which needs nothing of this project:

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    python tests/data/make_smollm2_greedy.py .demo/SmolLM2-135M-Instruct.Q4_1.gguf

It rewrites tests/data/smollm2_greedy.json beside it. Both sides restore the same GGUF file to fp32.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

import gguf
import torch
import transformers

HERE = Path(__file__).resolve().parent
LONG_TEXT = HERE.parents[1] / "src/fd_minicpm41/data/britannica_1911_shakespeare.txt"
MAX_TOKENS = 64
CHATS = {
    "sky": "Why is the sky blue?",
    "python": "Write a Python function that returns the n-th Fibonacci number.",
    "digits": "What is 1234 + 8766? Explain step by step.",
    "unicode": "Translate to English: « Où est la bibliothèque ? » and 你好，世界 🙂",
}
TEXTS = {
    "plain": "The three laws of motion say that",
    "one_token": "Once",
    "long": LONG_TEXT.read_text("utf-8").rstrip(),
}


def greedy(model: torch.nn.Module, prompt_ids: list[int]) -> tuple[list[int], float]:
    """``MAX_TOKENS`` ids, past any end token and the smallest lead of a best logit on the next."""
    ids, past, margin, output = torch.tensor([prompt_ids]), None, float("inf"), []
    for _ in range(MAX_TOKENS):
        with torch.no_grad():
            result = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = result.past_key_values
        best = result.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        output.append(int(best.indices[0]))
        ids = torch.tensor([[output[-1]]])
    return output, margin


def main(path: Path) -> None:
    names = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**names)
    model = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval()
    cases = []
    for name, content in (CHATS | TEXTS).items():
        if name in CHATS:
            messages = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = content
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        output_ids, margin = greedy(model, prompt_ids)
        case = {"name": name, "kind": "chat" if name in CHATS else "text"}
        if name != "long":
            case["prompt"] = content
        case |= {
            "prompt_ids": prompt_ids,
            "output_ids": output_ids,
            "output_text": tokenizer.decode(output_ids),
            "smallest_margin": round(margin, 5),
        }
        cases.append(case)
        print(name, len(prompt_ids), margin, repr(case["output_text"]))
    record = {
        "model": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_by": "tests/data/make_smollm2_greedy.py",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gguf": gguf.__version__ if hasattr(gguf, "__version__") else "0.19.0",
        },
        "dtype": "float32",
        "max_tokens": MAX_TOKENS,
        "cases": cases,
    }
    (HERE / "smollm2_greedy.json").write_text(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
