"""``fastdeploy.LLM`` behind a pipe: one JSON line in, one out. Started by :mod:`host`."""

import json
import os
import sys


def main() -> None:
    # Replies go to the real standard output; whatever FastDeploy prints goes to the log.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from fastdeploy import LLM, SamplingParams

    engine = LLM(**json.loads(sys.argv[1]))
    print(json.dumps("up"), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        outputs = engine.generate(
            request["prompts"],
            SamplingParams(**request["sampling"]),
        )
        reply = [
            {
                "token_ids": list(o.outputs.token_ids),
                "text": o.outputs.text,
                "finish_reason": getattr(o, "finish_reason", None),
                "num_cached_tokens": getattr(o, "num_cached_tokens", None),
            }
            for o in outputs
        ]
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
