"""Compare cached contexts with what one would do without them, on one base: `python -m dssk.evaluation.compare --help`.

Systems: the fused model (`cross_attention`); its base with the context in the prompt (`prompted`) and with the
context's KV cache read from disk (`prompted_prefix_cache`); the base fine-tuned on such prompts with LoRA
(`lora_prompted`) or whole (`full_prompted`). Controls and two heuristics stand beside them. What is finished is kept:
the same command goes on where it was stopped.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GPTBigCodeForCausalLM

from dssk import files, prompts
from dssk.checkpoint import MANIFEST, find_model, load_manifest, load_model
from dssk.console import quiet_libraries
from dssk.data.fingerprint import model_fingerprint
from dssk.data.ranks import Ranks
from dssk.errors import DsskError, run
from dssk.evaluation import cost
from dssk.evaluation.evaluate import CONTROLS, CrossAttentionSystem, checkpoint_fingerprint
from dssk.evaluation.finetune import LEARNING_RATES, FineTuning, fine_tuned
from dssk.evaluation.generate import MAX_NEW_TOKENS
from dssk.evaluation.heuristics import HeuristicSystem
from dssk.evaluation.predictions import System, answer_all, discard_partial
from dssk.evaluation.prompted import PrefixCachedSystem, PromptedSystem, cache_bytes_per_token, make_prompt
from dssk.evaluation.questions import QuestionSet, check_encodings, load_questions, spread
from dssk.evaluation.scores import score
from dssk.flags import Parser, bool_flag, nearest, positive_int
from dssk.models.base import load_base

SYSTEMS = ("cross_attention", "prompted", "prompted_prefix_cache", "lora_prompted", "full_prompted")
HEURISTICS = ("random_entity", "overlap")
METHODS = {"lora_prompted": "lora", "full_prompted": "full"}
TABLE, COST = "table.json", "cost.json"
TIMED_QUESTIONS = 9
ALONE = Ranks(0, 1, 0)


class Models:
    """The models that are compared, each made or loaded when first asked for."""

    def __init__(self, args: Namespace):
        self.args = args
        self.output = Path(args.output)
        self.folder = find_model(args.checkpoint)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.fused, self.tokenizer = load_model(self.folder)
        self.fused.to(self.device)
        self.plain: dict[str, GPTBigCodeForCausalLM] = {}
        self.trained_parameters = {"cross_attention": self.fused.trainable_parameters()[0]}
        self.settings: dict[str, dict[str, Any]] = {}

    @property
    def config(self):
        return self.fused.config

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """What the checkpoint was trained with, and its step, so far as it is known."""
        if not (self.folder / MANIFEST).is_file():
            return {}
        manifest = load_manifest(self.folder)
        return {**manifest.get("experiment", {}), "step": manifest.get("step")}

    @cached_property
    def base_fingerprint(self) -> str:
        config = self.config
        return model_fingerprint(config.base_model_name_or_path, config, config.base_model_revision)

    def get(self, system: str) -> GPTBigCodeForCausalLM:
        """The plain model that answers prompts for a system."""
        name = METHODS.get(system, "base")
        if name not in self.plain:
            model, trained = self._fine_tuned(system) if name in METHODS.values() else (self._base(), 0)
            self.plain[name] = model.to(self.device)
            self.trained_parameters[system] = trained
        self.trained_parameters.setdefault(system, 0)
        return self.plain[name]

    def _base(self) -> GPTBigCodeForCausalLM:
        config = self.config
        return load_base(config.base_model_name_or_path, config.base_model_revision, dtype=self.fused.dtype)

    def fine_tuning(self, system: str) -> FineTuning:
        """How a system is trained: as long and on as many rows a step as the checkpoint, if flags say nothing else."""
        args, experiment = self.args, self.experiment
        method = METHODS[system]
        rows = experiment.get("train_batch_size", 32) * experiment.get("skip_steps", 1)
        return FineTuning(
            method=method,  # type: ignore[arg-type]
            base=self.base_fingerprint,
            data=self.train_questions.fingerprint,
            loss_on=experiment.get("loss_on", "all"),
            steps=args.steps or experiment.get("step") or 1000,
            batch_size=args.batch_size or rows,
            learning_rate=args.learning_rate or LEARNING_RATES[method],
            lora_rank=args.lora_rank,
            seed=args.seed,
        )

    @cached_property
    def train_questions(self) -> QuestionSet:
        return load_questions(self.args.data_path, self.tokenizer, self.config, "train")

    def _fine_tuned(self, system: str) -> tuple[GPTBigCodeForCausalLM, int]:
        config, settings = self.config, self.fine_tuning(system)
        print(
            f"{system}: {settings.steps} steps x {settings.batch_size} prompts, at {settings.learning_rate}"
        )
        return fine_tuned(
            config.base_model_name_or_path,
            config.base_model_revision,
            self.tokenizer,
            self.train_questions.rows,
            settings,
            self.output / system,
        )


def answer(system: str, models: Models, name: str, questions: QuestionSet, args: Namespace) -> dict[str, Any]:
    """The scores (see `scores.score`) of a system on a set of questions; answered unless that was done before."""
    settings = _settings(system, models, questions, args)
    label = f"{name}-{system.replace('/', '-')}"
    file = models.output / f"scores-{label}.json"
    path = models.output / f"predictions-{label}.jsonl"
    if file.is_file() and path.is_file():
        kept = json.loads(file.read_text())
        if kept["settings"] == settings:
            return kept["scores"]
    batch_size = args.eval_batch_size
    predictions = answer_all(
        questions, _system(system, models, questions, args), path, settings, batch_size, ALONE
    )
    scores = score(predictions, CONTROLS)
    files.publish_json(file, {"settings": settings, "scores": scores})
    discard_partial(path)
    return scores


def _settings(system: str, models: Models, questions: QuestionSet, args: Namespace) -> dict[str, Any]:
    """All that decides a system's answers."""
    settings: dict[str, Any] = {
        "system": system,
        "questions": questions.fingerprint,
        "eval_batch_size": args.eval_batch_size,
        "max_new_tokens": args.max_new_tokens,
        "template_version": prompts.TEMPLATE_VERSION,
    }
    if system == "cross_attention":
        settings["checkpoint"] = checkpoint_fingerprint(models.folder)
    elif system in METHODS:
        settings |= asdict(models.fine_tuning(system))
    elif not system.startswith("heuristic/"):
        settings["base"] = models.base_fingerprint
    return settings


def _system(system: str, models: Models, questions: QuestionSet, args: Namespace) -> System:
    if system.startswith("heuristic/"):
        return HeuristicSystem(system.removeprefix("heuristic/"), questions)
    if system == "cross_attention":
        return CrossAttentionSystem(models.fused, models.tokenizer, questions, CONTROLS, args.max_new_tokens)
    model = models.get(system)
    if system == "prompted_prefix_cache":
        folder = models.output / "prefix_cache" / models.base_fingerprint
        made: PromptedSystem = PrefixCachedSystem(
            model, models.tokenizer, questions, folder, args.max_new_tokens
        )
    else:
        made = PromptedSystem(model, models.tokenizer, questions, args.max_new_tokens)
    if made.num_cut:
        positions = model.config.max_position_embeddings
        print(f"{system}: {made.num_cut} of {len(questions)} contexts were cut to fit {positions} positions")
    return made


def measure_costs(
    systems: Sequence[str], models: Models, questions: QuestionSet
) -> dict[str, dict[str, Any]]:
    """The cost columns of all systems, measured together on some of the questions."""
    positions = models.config.max_position_embeddings
    chosen = [
        make_prompt(models.tokenizer, questions.rows[i], positions, cost.NEW_TOKENS)
        for i in spread(len(questions), TIMED_QUESTIONS)
    ]
    num_bytes = dict.fromkeys(systems, 0)
    timed: dict[str, cost.Generate] = {}
    with tempfile.TemporaryDirectory(dir=models.output) as folder:
        for system in systems:
            if system == "cross_attention":
                timed[system] = cost.cross_attending(models.fused, chosen, Path(folder) / "states")
                num_bytes[system] = questions.bytes_per_context_token
            elif system == "prompted_prefix_cache":
                timed[system] = cost.prefix_cached(models.get(system), chosen, Path(folder) / "prefix_cache")
                num_bytes[system] = cache_bytes_per_token(models.get(system))
            else:
                timed[system] = cost.prompting(models.get(system))
        seconds = cost.measure(timed, chosen)
    return {
        system: {
            "trained_parameters": models.trained_parameters[system],
            "bytes_per_context_token": num_bytes[system],
            **seconds[system],
        }
        for system in systems
    }


def rows_of(
    system: str, name: str, scores: dict[str, Any], costs: dict[str, Any], settings: Any
) -> list[dict]:
    """A system's row of table.json for one set of questions, then those of its controls."""
    rows = []
    for control, scored in scores.items():
        if not isinstance(scored, dict):
            continue
        own = control == "with_context"
        rows.append(
            {
                "system": system if own else f"{system}/{control}",
                "data": name,
                **{key: scored[key] for key in ("n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high")},
                **{key: scored[key] for key in ("rouge_l", "span_em", "answer_nll")},
                **(costs if own else dict.fromkeys(costs)),
                **({"settings": settings} if own else {}),
            }
        )
    if "right_beats_wrong" in scores:
        rows[0]["right_beats_wrong"] = scores["right_beats_wrong"]
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of table.json or cost.json for a terminal."""
    head = f"{'':36}{'EM':>7}{'95 %':>15}{'F1':>7}{'NLL':>7}{'trained':>13}{'bytes/tok':>10}{'first s':>10}{'tok/s':>8}"
    lines, data = [head], None
    for row in rows:
        if row.get("data") != data:
            data = row["data"]
            lines.append(f"{data}, {row['n']} questions")
        interval = f"{row['em_low']:.3f}..{row['em_high']:.3f}" if "em" in row else ""
        lines.append(
            f"  {row['system']:34}{_cell(row, 'em', '.3f'):>7}{interval:>15}{_cell(row, 'f1', '.3f'):>7}"
            f"{_cell(row, 'answer_nll', '.2f'):>7}{_cell(row, 'trained_parameters', ','):>13}"
            f"{_cell(row, 'bytes_per_context_token', ','):>10}{_cell(row, 'first_token_s', '.4f'):>10}"
            f"{_cell(row, 'tokens_per_s', '.1f'):>8}"
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, style: str) -> str:
    return "" if row.get(key) is None else format(row[key], style)


def system_list(text: str) -> list[str]:
    """Parse the names of systems, divided by commas."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SYSTEMS:
            raise DsskError(f"no system {name!r}{nearest(name, SYSTEMS)}: want some of {','.join(SYSTEMS)}")
    return [system for system in SYSTEMS if system in names]


def question_sets(models: Models, args: Namespace) -> dict[str, QuestionSet]:
    """The sets to score on by name: `val` of the store, then those of `--eval`."""
    paths = {"val": args.data_path}
    for entry in args.eval:
        name, separator, path = entry.partition("=")
        if not separator or not name.replace("_", "").replace("-", "").isalnum() or name in paths:
            raise DsskError(
                f"--eval got {entry!r}, want name=STORE_OR_FILE with a new name of letters and digits"
            )
        paths[name] = path
    for path in paths.values():
        check_encodings(path, models.folder, models.config)
    return {
        name: load_questions(path, models.tokenizer, models.config, limit=args.max_questions)
        for name, path in paths.items()
    }


def compare(args: Namespace) -> list[dict[str, Any]]:
    """Answer with every system, measure what answering costs, and write the table."""
    systems = system_list(args.systems)
    files.make_folder(Path(args.output))
    models = Models(args)
    sets = question_sets(models, args)
    answered = {
        (system, name): answer(system, models, name, questions, args)
        for system in [*systems, *(f"heuristic/{name}" for name in HEURISTICS)]
        for name, questions in sets.items()
    }
    costs = measure_costs(systems, models, next(iter(sets.values())))
    table = []
    for name, questions in sets.items():
        for (system, scored_on), scores in answered.items():
            if scored_on == name:
                settings = _settings(system, models, questions, args)
                nothing = dict.fromkeys(next(iter(costs.values())))
                table += rows_of(system, name, scores, costs.get(system, nothing), settings)
    files.publish_json(models.output / TABLE, table)
    return table


def main() -> None:
    parser = Parser(prog="python -m dssk.evaluation.compare", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, fused model, or a run's folder")
    parser.add_argument("--data_path", required=True, help="store: trains on its train split, scores on val")
    parser.add_argument("--output", default="runs/compare", help="folder to write (%(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of %(default)s")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=STORE_OR_FILE",
        help="score on these questions as well; may be given several times",
    )
    parser.add_argument(
        "--max_questions", type=positive_int, help="score this many of each set, spread over it"
    )
    parser.add_argument(
        "--eval_batch_size", type=positive_int, default=32, help="questions answered at a time (%(default)s)"
    )
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=MAX_NEW_TOKENS, help="longest answer (%(default)s)"
    )
    training = parser.add_argument_group("fine-tuning of lora_prompted and full_prompted")
    training.add_argument("--steps", type=positive_int, help="optimizer steps (as many as the checkpoint's)")
    training.add_argument("--batch_size", type=positive_int, help="prompts a step (as the checkpoint's)")
    training.add_argument(
        "--learning_rate",
        type=float,
        help=f"at its peak (LoRA {LEARNING_RATES['lora']}, whole {LEARNING_RATES['full']})",
    )
    training.add_argument("--lora_rank", type=positive_int, default=16, help="(%(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of the order of rows (%(default)s)")
    parser.add_argument(
        "--medium_cost",
        type=bool_flag,
        default=True,
        metavar="BOOL",
        help="also measure a random model of 124 million parameters at contexts of 1500 tokens, a minute or two "
        f"on a CPU, unless {COST} is there (%(default)s)",
    )
    args = parser.parse_args()
    quiet_libraries()
    table = compare(args)
    print(f"{render(table)}\n{Path(args.output) / TABLE}")
    file = Path(args.output) / COST
    if args.medium_cost and not file.is_file():
        with tempfile.TemporaryDirectory(dir=args.output) as folder:
            files.publish_json(file, cost.medium(Path(folder)))
    if file.is_file():
        print(
            f"random weights, contexts of {cost.MEDIUM_CONTEXT} tokens\n{render(json.loads(file.read_text()))}\n{file}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
