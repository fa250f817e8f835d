"""Trains the small model on one NVIDIA GPU and examines it.

    python benchmarks/train_small/train.py --out DIR --seed 0 --minutes 12

All of it (drawing data, training, examination, export) ends within ``--minutes``. Training is saved
every minute: the same command goes on where a killed run stopped. ``DIR`` then holds:
``checkpoint/`` (the model in Hugging Face's form), ``scores.json``, ``log.jsonl``, ``run.json``
(configuration and versions) and ``loss.png``, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
STARTED = time.monotonic()  # before PyTorch is loaded, which takes its time

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fd_minicpm41.config import MiniCPMConfig  # noqa: E402
from fd_minicpm41.errors import UsageError  # noqa: E402
from train_small import checkpoint, corpus, evaluate, tokenizer  # noqa: E402
from train_small.card import write_card  # noqa: E402
from train_small.data import FIRST, IGNORED, PROSE, REPLY, VALUE, Batch, Feeder, Recipe, Writer  # noqa: E402
from train_small.model import AttentionKind, Pass, SmallMiniCPM, cap_heads, initialise  # noqa: E402
from train_small.muon import Muon  # noqa: E402
from train_small.plot import plot_loss  # noqa: E402

SAVE_EVERY_S = 60.0
NEEDED_GIB = 24
PEEK_EVERY_S = 20.0
# Queries and keys learn more slowly, and their heads may grow to a multiple of their first size:
# there are no norms on them.
MUON_LR, QUERY_KEY_SHARE, ADAM_LR, WEIGHT_DECAY = 3e-3, 0.67, 3e-3, 0.05
MOST_HEAD_GROWTH = 2.0
WARM_UP, DECAY_FROM = 0.02, 0.5
# No phase waits for its hits longer than until this share of the training time.
LATEST = 0.5
# Mean losses of the kinds of tokens are added with these weights.
LOSS_WEIGHTS = {PROSE: 0.5, REPLY: 1.0, VALUE: 0.5, FIRST: 1.0}
SELECTION_WEIGHT = 0.5
LOGGED = ("prose", "reply", "value", "first", "first_hits", "value_hits", "selection")


@dataclass(frozen=True)
class Phase:
    """A part of training.

    Attributes:
        until: it ends at this share of the training time.
        mixture: recipe to its share of the steps.
        attention: of recipes that are sparse or probed.
        hits: it goes on until this share of values is begun right, at most until ``LATEST``. At
            first all of them are guessed; when the match is found, which is within seconds,
            differs from seed to seed.
    """

    name: str
    until: float
    mixture: dict[str, float]
    attention: AttentionKind = "dense"
    hits: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Everything that differs between a training and its rehearsal."""

    recipes: dict[str, Recipe]
    peeks: dict[str, Recipe]
    phases: tuple[Phase, ...]
    # Recipes at least so long teach the selection, and are sparse in the last phase.
    probed_from: int
    probe_rows: int
    questions: int
    prompts: int
    lengths: tuple[int, ...]
    max_tokens: int
    examination_share: float


FULL = Plan(
    recipes={
        "256": Recipe(256, 32768, 0.4, 0.1, drills=0.45),
        "512": Recipe(512, 32768, 0.35, 0.2, drills=0.4),
        "512 stretched": Recipe(512, 32768, 0.4, 0.2, 0.6, drills=0.3),
        "1k": Recipe(1024, 32768, 0.4, 0.3, 0.6, drills=0.15),
        "2k": Recipe(2048, 32768, 0.65, 0.0, 0.6, drills=0.2),
        "4k": Recipe(4096, 32768, 0.85, 0.0),
        "8k": Recipe(8192, 32768, 0.85, 0.0),
        "16k": Recipe(16384, 32768, 0.85, 0.0),
    },
    peeks={
        "drill": Recipe(512, 8192, 0.0, 0.0, drills=1.0),
        "512": Recipe(512, 16384, 1.0, 0.0),
        "8k": Recipe(8192, 32768, 1.0, 0.0),
        "prose": Recipe(2048, 16384, 0.0, 0.0),
    },
    phases=(
        Phase("first", 0.12, {"256": 0.6, "512": 0.4}),
        Phase("short", 0.32, {"256": 0.15, "512": 0.15, "512 stretched": 0.4, "1k": 0.3}, hits=0.9),
        Phase("longer", 0.48, {"512 stretched": 0.2, "1k": 0.3, "2k": 0.25, "4k": 0.25}),
        Phase("long", 0.72, {"1k": 0.35, "4k": 0.2, "8k": 0.2, "16k": 0.25}),
        Phase("sparse", 1.0, {"1k": 0.35, "4k": 0.15, "8k": 0.2, "16k": 0.3}, "sparse"),
    ),
    probed_from=4096,
    probe_rows=128,
    questions=304,
    prompts=500,
    lengths=(1024, 2048, 4096, 8192, 16384),
    max_tokens=120,
    examination_share=0.16,
)
REHEARSAL = Plan(
    recipes={"512": Recipe(512, 1024, 0.6, 0.4), "1k": Recipe(1024, 1024, 0.85, 0.0)},
    peeks={"512": Recipe(512, 512, 1.0, 0.0)},
    phases=(
        Phase("short", 0.3, {"512": 1.0}),
        Phase("long", 0.6, {"512": 0.5, "1k": 0.5}),
        Phase("sparse", 1.0, {"512": 0.3, "1k": 0.7}, "sparse"),
    ),
    probed_from=1024,
    probe_rows=16,
    questions=2,
    prompts=5,
    lengths=(512, 1024),
    max_tokens=12,
    examination_share=0.3,
)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 products on a GPU; a CPU, which is slower in bf16, keeps fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """A model with its optimisers, and how far it has come."""

    def __init__(self, model: SmallMiniCPM, plan: Plan, seed: int) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        named = dict(model.named_parameters())
        matrices = {n: w for n, w in named.items() if "layers" in n and w.dim() == 2}
        slow = [w for n, w in matrices.items() if "q_proj" in n or "k_proj" in n]
        fast = [w for n, w in matrices.items() if "q_proj" not in n and "k_proj" not in n]
        others = [w for n, w in named.items() if n not in matrices]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(
                [{"params": slow, "share": QUERY_KEY_SHARE}, {"params": fast, "share": 1.0}],
                lr=MUON_LR,
                weight_decay=WEIGHT_DECAY,
            ),
            torch.optim.AdamW(
                [{"params": others, "share": 1.0}],
                lr=ADAM_LR,
                betas=(0.9, 0.95),
                weight_decay=0.0,
                fused=True,
            ),
        ]
        self.elapsed = 0.0
        self.steps = 0
        self.starts = 0
        self.hits = 0.0  # the best share so far of values that are begun right
        self.device = model.lm_head.weight.device

    def save(self, path: Path) -> None:
        """Replaces the last save; a kill at any moment leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "elapsed": self.elapsed,
            "steps": self.steps,
            "starts": self.starts,
            "hits": self.hits,
            "seed": self.seed,
        }
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, path)

    def resume(self, path: Path) -> None:
        """Goes on from a save.

        Raises:
            UsageError: a damaged file, or one of another seed.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimiser, held in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(held)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"{path} cannot be resumed from ({reason}): delete it to train from the start"
            ) from None
        if state["seed"] != self.seed:
            raise UsageError(
                f"{path} was trained with seed {state['seed']}, wanted {self.seed}: give its seed, "
                "or another --out"
            )
        self.elapsed, self.steps = state["elapsed"], state["steps"]
        self.starts, self.hits = state["starts"] + 1, state["hits"]

    def set_rates(self, share: float) -> None:
        """Learning rates by the share of the training time: warm-up, level, linear decay."""
        factor = min(1.0, share / WARM_UP) if share < DECAY_FROM else 1.0
        if share >= DECAY_FROM:
            factor = max(0.02, (1.0 - share) / (1.0 - DECAY_FROM))
        for optimiser, rate in zip(self.optimisers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"] * max(factor, 0.02)

    def measure(
        self, batch: Batch, attention: AttentionKind, probe: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what is logged of it (``LOGGED``), both on the device."""
        to: dict[str, Any] = {"device": self.device, "non_blocking": True}
        ids = torch.from_numpy(batch.ids).to(**to).long()
        positions = torch.from_numpy(batch.positions).to(**to).long()
        following = batch.kinds[:, 1:]
        rows = None if probe is None else torch.from_numpy(probe).to(**to)
        step = Pass(positions, attention, probe=rows)
        # Chosen on the host, so that the device's shapes need not be waited for.
        where = np.flatnonzero(np.pad(following, ((0, 0), (0, 1))) != IGNORED)
        kinds = torch.from_numpy(following[following != IGNORED].astype(np.int64)).to(**to)
        places = torch.from_numpy(where).to(**to)
        with mixed_precision(self.device):
            hidden = self.model.hidden(ids, step).flatten(0, 1)[places]
            logits = self.model.lm_head(hidden).float()
        target = ids.flatten()[places + 1]
        each = F.cross_entropy(logits, target, reduction="none")
        counts = torch.bincount(kinds, minlength=FIRST + 1).clamp_min(1)
        zeros = torch.zeros(FIRST + 1, device=self.device)
        means = zeros.index_add(0, kinds, each) / counts
        selection = torch.as_tensor(step.selection_loss, device=self.device)
        loss = SELECTION_WEIGHT * selection
        for kind, weight in LOSS_WEIGHTS.items():
            loss = loss + weight * means[kind]
        with torch.no_grad():
            hits = zeros.index_add(0, kinds, (logits.argmax(-1) == target).float()) / counts
            shown = [*means[PROSE:].detach(), hits[FIRST], hits[VALUE], selection.detach()]
        return loss, torch.stack([value.float() for value in shown])

    def step(self, batch: Batch, phase: Phase, rng: np.random.Generator) -> Tensor:
        """One step; returns what is to be logged, still on the device."""
        probed = batch.ids.shape[1] >= self.plan.probed_from
        probe = self._probe(batch, rng) if probed else None
        loss, shown = self.measure(batch, phase.attention if probed else "dense", probe)
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        cap_heads(self.model, MOST_HEAD_GROWTH)
        return shown

    def peek(self, batches: dict[str, Batch]) -> dict[str, dict[str, float]]:
        """Dense losses and hits on held-out batches."""
        found = {}
        with torch.no_grad():
            for name, batch in batches.items():
                values = self.measure(batch, "dense", None)[1].tolist()
                found[name] = {n: round(v, 3) for n, v in zip(LOGGED, values, strict=True) if v}
        return found

    def _probe(self, batch: Batch, rng: np.random.Generator) -> np.ndarray:
        """Rows whose selection is taught: half predict values and replies, half are any."""
        length, count = batch.ids.shape[1], self.plan.probe_rows
        # From here on every row sees a coarse window and has blocks to choose from.
        earliest = length // 4
        rows = rng.integers(earliest, length - 1, (len(batch.ids), count))
        for i, kinds in enumerate(batch.kinds):
            answers = np.flatnonzero(kinds >= REPLY) - 1
            answers = answers[answers >= earliest]
            if len(answers):
                values = np.flatnonzero(kinds >= VALUE) - 1
                half = count // 2
                rows[i, : half // 2] = rng.choice(answers, half // 2)
                rows[i, half // 2 : half] = rng.choice(values, half - half // 2)
        return np.clip(rows, earliest, length - 1)

    def phase(self, share: float) -> Phase:
        """The phase at a share of the training time."""
        phases = self.plan.phases
        waits = share < LATEST
        return next(
            (p for p in phases if share < p.until or (waits and self.hits < p.hits)), phases[-1]
        )


def train(
    trainer: Trainer, feeder: Feeder, held_out: dict[str, Batch], budget_s: float, out: Path
) -> None:
    """Trains until ``budget_s`` seconds of training, those before a resume counted, are spent.

    What the model makes of ``held_out`` is printed now and then.
    """
    rng = np.random.default_rng([trainer.seed, trainer.starts])
    mix = random.Random(f"{trainer.seed}/{trainer.starts}")
    before = trainer.elapsed
    began = saved = said = peeked = time.monotonic()
    losses: list[tuple[str, int, Tensor]] = []
    current = ""
    events: list[Any] = []
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.elapsed < budget_s:
            share = trainer.elapsed / budget_s
            phase = trainer.phase(share)
            if phase.name != current:
                current = phase.name
                later = [p for p in trainer.plan.phases if p.until > phase.until][:1]
                feeder.want(sorted({n for p in [phase, *later] for n in p.mixture}))
                print(f"{time.monotonic() - began + before:6.1f} s  phase {current}", flush=True)
            name = mix.choices(list(phase.mixture), list(phase.mixture.values()))[0]
            trainer.set_rates(share)
            losses.append((name, trainer.steps, trainer.step(feeder.get(name), phase, rng)))
            trainer.steps += 1
            if trainer.device.type == "cuda":
                # Two steps in flight: the clock then tells what has really been done.
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > 2:
                    events.pop(0).synchronize()
            trainer.elapsed = before + time.monotonic() - began
            if time.monotonic() - said > 2.0:
                said = time.monotonic()
                _log(log, trainer, phase, losses)
            if time.monotonic() - peeked > PEEK_EVERY_S:
                peeked = time.monotonic()
                print(f"{trainer.elapsed:6.1f} s  held out: {trainer.peek(held_out)}", flush=True)
            if time.monotonic() - saved > SAVE_EVERY_S:
                trainer.save(out / "state.pt")
                saved = time.monotonic()
        _log(log, trainer, trainer.plan.phases[-1], losses)
    trainer.save(out / "state.pt")


def _log(log: Any, trainer: Trainer, phase: Phase, losses: list[tuple[str, int, Tensor]]) -> None:
    lines = []
    for recipe, number, values in losses:
        given = {n: round(v, 4) for n, v in zip(LOGGED, values.tolist(), strict=True)}
        lines.append({"step": number, "phase": phase.name, "recipe": recipe} | given)
    for line in lines:
        log.write(json.dumps(line | {"elapsed_s": round(trainer.elapsed, 2)}) + "\n")
    log.flush()
    if lines:
        mean = sum(line["first_hits"] for line in lines) / len(lines)
        trainer.hits = max(trainer.hits, mean)
        print(f"{trainer.elapsed:6.1f} s  {json.dumps(lines[-1])}", flush=True)
    losses.clear()


def rehearsal_sparse(config: Any) -> Any:
    """A selection that has something to leave out in a thousand tokens."""
    sparse = dataclasses.replace(config.sparse, window_size=64, topk=4, dense_len=128)
    return dataclasses.replace(config, sparse=sparse)


def trained_config(config: MiniCPMConfig) -> MiniCPMConfig:
    """The configuration in training, with its budget of blocks."""
    sparse = config.sparse
    assert sparse is not None
    fewer = max(0, sparse.budget - checkpoint.TRAINED_BUDGET)
    return dataclasses.replace(config, sparse=dataclasses.replace(sparse, topk=sparse.topk - fewer))


def check_device(rehearse: bool) -> torch.device:
    """The GPU, or in a rehearsal whatever there is.

    Raises:
        UsageError: no GPU, or too little free memory on it.
    """
    if rehearse and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            "no NVIDIA GPU is visible, wanted one of at least compute capability 8.0: run on a "
            "machine that has one, or add --rehearse to try every step on this CPU"
        )
    free = torch.cuda.mem_get_info()[0] / 2**30
    if not rehearse and free < NEEDED_GIB:
        raise UsageError(
            f"the GPU has {free:.1f} GiB free, wanted {NEEDED_GIB}: end what else runs on it"
        )
    return torch.device("cuda")


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found


def run(args: argparse.Namespace) -> None:
    """Corpus, tokenizer, training, examination, export."""
    began = STARTED
    torch.manual_seed(args.seed)
    device = check_device(args.rehearse)
    out, plan = args.out, REHEARSAL if args.rehearse else FULL
    out.mkdir(parents=True, exist_ok=True)
    books = args.corpus or out / "corpus"
    if args.corpus is None and not corpus.is_complete(books):
        corpus.fetch(books)
    prose = corpus.load(books)
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    tokenizer.write(tokenizer.train(prose.train), folder)
    config = checkpoint.parsed_config()
    if args.rehearse:
        config = rehearsal_sparse(config)

    state = out / "state.pt"
    starts = 0
    if state.exists():
        starts = int(state.stat().st_mtime)  # other batches than those already seen
    feeder = Feeder(folder, prose.train, plan.recipes, args.seed * 1000003 + starts, args.workers)
    try:
        model = SmallMiniCPM(trained_config(config)).to(device)
        initialise(model, args.seed)
        trainer = Trainer(model, plan, args.seed)
        if state.exists():
            trainer.resume(state)
            print(f"going on after {trainer.elapsed:.0f} s of training", flush=True)
        else:
            (out / "log.jsonl").unlink(missing_ok=True)
        spent = time.monotonic() - began
        budget = args.minutes * 60 * (1 - plan.examination_share) - spent
        writer = Writer(folder, prose.held_out)
        held_out = {
            name: writer.batch(random.Random(name), recipe, "held_out")
            for name, recipe in plan.peeks.items()
        }
        train(trainer, feeder, held_out, budget, out)
    finally:
        feeder.close()

    model.use_sparse(config.sparse)
    weights = export(model, folder, out)
    print(f"{time.monotonic() - began:6.1f} s  trained {trainer.steps} steps", flush=True)
    scores: dict[str, Any] = {}
    examinations = evaluate.evaluate(
        model, writer, plan.questions, plan.prompts, plan.lengths, plan.max_tokens
    )
    for name, examine in examinations:
        try:
            with torch.no_grad(), mixed_precision(device):
                scores[name] = examine()
        except RuntimeError as error:
            # The others still tell something; the bars then count as missed.
            scores[name] = {"error": str(error).splitlines()[0]}
        told = {k: v for k, v in scores[name].items() if k not in ("failures",)}
        print(f"{time.monotonic() - began:6.1f} s  {name}: {json.dumps(told)}", flush=True)
        _write_json(out / "scores.json", scores)
    scores["bars"] = evaluate.meets_bars(scores)
    scores["run"] = {
        "seed": args.seed,
        "minutes": args.minutes,
        "steps": trainer.steps,
        "training_s": round(trainer.elapsed, 1),
        "seconds": round(time.monotonic() - began, 1),
        "weights": weights,
        **versions(),
    }
    _write_json(out / "scores.json", scores)
    _write_json(
        out / "run.json",
        {
            "arguments": {"seed": args.seed, "minutes": args.minutes, "rehearse": args.rehearse},
            "plan": dataclasses.asdict(plan),
            "muon_lr": MUON_LR,
            "query_key_share": QUERY_KEY_SHARE,
            "most_head_growth": MOST_HEAD_GROWTH,
            "loss_weights": {str(kind): weight for kind, weight in LOSS_WEIGHTS.items()},
            "adam_lr": ADAM_LR,
            "weight_decay": WEIGHT_DECAY,
            "warm_up": WARM_UP,
            "decay_from": DECAY_FROM,
            "selection_weight": SELECTION_WEIGHT,
            "trained_budget": min(checkpoint.TRAINED_BUDGET, config.sparse.budget),
            "model": checkpoint.model_config(),
            "versions": versions(),
        },
    )
    if not any("error" in score for score in scores.values()):
        write_card(folder, scores)
    plot_loss(out / "log.jsonl", out / "loss.png")
    print(json.dumps(scores["bars"], indent=1), flush=True)
    print(f"{time.monotonic() - began:6.1f} s  done: {folder}", flush=True)


def export(model: SmallMiniCPM, folder: Path, out: Path) -> int:
    """Rounds the weights to bf16, in the model too, and writes the checkpoint; their number."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    arrays = {name: weight.detach().cpu().numpy() for name, weight in model.named_parameters()}
    from tokenizers import Tokenizer

    checkpoint.write_checkpoint(folder, Tokenizer.from_file(str(folder / "tokenizer.json")), arrays)
    return sum(array.size for array in arrays.values())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="what is made goes here")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--minutes", type=float, default=12.0, metavar="M", help="in all (default: 12)"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="folder with the books (default: DIR/corpus, filled by pip if it is not there)",
    )
    parser.add_argument(
        "--fetch-corpus", type=Path, metavar="DIR", help="only fill this folder with the books"
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="processes that draw batches"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every step with tiny batches, on the CPU if there is no GPU; the model is of no use",
    )
    args = parser.parse_args()
    try:
        if args.fetch_corpus is not None:
            corpus.fetch(args.fetch_corpus)
            return 0
        if args.out is None:
            raise UsageError("--out is missing, wanted a folder: name one for what is made")
        run(args)
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        print(f"error: the GPU's memory is used up ({said}): end what else runs", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from its last save", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
