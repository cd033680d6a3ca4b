"""The systems that are compared: how each is made, by which settings, and what answers with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dssk.checkpoint import MANIFEST, load_manifest
from dssk.data.distractors import Distractors
from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.evaluate import CrossAttentionSystem, checkpoint_fingerprint, control_list, left_out
from dssk.evaluation.predictions import System
from dssk.evaluation.questions import Question, QuestionSet, load_questions
from dssk.inference.fingerprint import model_fingerprint
from dssk.inference.loading import device, find_model, load_base, load_model
from dssk.inference.tokenizer import template_version
from dssk.models.shapes import kv_cache_values, window
from dssk.research.finetune import FineTuning, fine_tuned
from dssk.research.heuristics import HeuristicSystem
from dssk.research.prompted import PrefixCachedSystem, PromptedSystem, Several
from dssk.utils.defaults import CONTROLS, RATE_FACTORS

HEURISTICS = ("heuristic/random_entity", "heuristic/overlap")
SHUFFLED = "_shuffled"  # ends the name of a prompted system whose contexts stand in another order
WORKED_EXAMPLES = 2  # in the prompts of prompted_examples
MOST_STEPS = 1_000_000  # of a training that minutes end
_METHODS = {"lora_prompted": "lora", "full_prompted": "full"}


@dataclass(frozen=True)
class Comparison:
    """What is compared and how: the flags of `dssk compare`."""

    checkpoint: str
    data_path: str  # store: trains on its train split, scores on val
    output: str
    systems: str | None  # with commas between; None: all that need not be named
    controls: str  # of the fused model, with commas between
    eval: Sequence[str]  # NAME=STORE_OR_FILE
    max_questions: int | None  # of each set; None: all
    eval_batch_size: int  # questions answered at a time
    max_new_tokens: int
    steps: int | None  # of fine-tuning; None, here and below: as the checkpoint's
    minutes: float | None  # CPU minutes that end it; None: steps do
    batch_size: int | None  # prompts a step
    learning_rate: float | None  # at its peak
    lora_rank: int
    seed: int  # of the order of rows
    medium_cost: bool  # also measure a random model of 124 million parameters
    num_contexts: str | None  # that are read together, with commas between; None: one alone
    distractors: str  # where the others come from, with commas between


class Systems:
    """A checkpoint and everything that is compared with it on its base; a model is made when first asked for."""

    def __init__(self, wanted: Comparison):
        self.wanted = wanted
        self.output = Path(wanted.output)
        self.controls = control_list(wanted.controls)
        self.mix = by_number.parse_sources(wanted.distractors)
        self.folder = find_model(wanted.checkpoint)
        self.fused, self.tokenizer = load_model(self.folder, device=device())
        self.config = self.fused.config
        self.reader: str = self.config.reader  # the name of the checkpoint among the systems
        if not self.config.base_model_name_or_path:
            raise DsskError(
                f"{self.folder} does not say what its base is: want a checkpoint made by trainval.py"
            )
        self._distractors: dict[str, Distractors] = {}
        self._plain: dict[str, tuple[PreTrainedModel, int]] = {}

    def folder_of(self, number: int) -> Path:
        """The folder of answers from so many contexts; 0: from the question's own alone."""
        return self.output / f"{by_number.WITH}{number}" if number else self.output

    def model(self, system: str) -> PreTrainedModel:
        """The model that answers for a system."""
        return self.fused if system == self.reader else self._get(system)[0]

    def trained_parameters(self, system: str) -> int:
        """How many parameters were trained to make a system from the base."""
        return self.fused.trainable_parameters()[0] if system == self.reader else self._get(system)[1]

    def _get(self, system: str) -> tuple[PreTrainedModel, int]:
        """A plain model and how many of its parameters were trained."""
        name = system if system in _METHODS else "base"
        if name not in self._plain:
            model, trained = self._fine_tuned(system) if system in _METHODS else (self._base(), 0)
            self._plain[name] = model.to(self.fused.device), trained
        return self._plain[name]

    def _base(self) -> PreTrainedModel:
        config = self.config
        return load_base(config.base_model_name_or_path, config.base_model_revision, dtype=self.fused.dtype)

    def _fine_tuned(self, system: str) -> tuple[PreTrainedModel, int]:
        return fine_tuned(
            self.config.base_model_name_or_path,
            self.config.base_model_revision,
            self.tokenizer,
            self.train_questions.rows,
            self.fine_tuning(system),
            self.output / system,
        )

    @cached_property
    def train_questions(self) -> QuestionSet:
        return load_questions(self.wanted.data_path, self.tokenizer, self.config, "train")

    def fine_tuning(self, system: str) -> FineTuning:
        """Settings of a system's fine-tuning: by default as many steps and rows a step as the checkpoint's."""
        wanted, experiment = self.wanted, self._experiment
        method = _METHODS[system]
        rows = wanted.batch_size or experiment.get("train_batch_size", 32) * experiment.get("skip_steps", 1)
        together = experiment.get("questions_per_context", 1)
        if rows % together:
            raise DsskError(
                f"--batch_size {rows} is no multiple of the checkpoint's questions_per_context {together}"
            )
        return FineTuning(
            method=method,  # type: ignore[arg-type]
            base=self.base_fingerprint,
            data=self.train_questions.fingerprint,
            loss_on=experiment.get("loss_on", "all"),
            steps=wanted.steps or (wanted.minutes and MOST_STEPS) or experiment.get("step") or 1000,
            batch_size=rows,
            learning_rate=wanted.learning_rate
            or RATE_FACTORS[method] * experiment.get("learning_rate", 1e-3),
            lora_rank=wanted.lora_rank,
            seed=wanted.seed,
            questions_per_context=together,
            minutes=wanted.minutes,
            bf16=experiment.get("bf16", False),
        )

    @cached_property
    def _experiment(self) -> dict[str, Any]:
        """The experiment of the checkpoint, and its step, as far as they are known."""
        if not (self.folder / MANIFEST).is_file():
            return {}
        manifest = load_manifest(self.folder)
        return {**manifest.get("experiment", {}), "step": manifest.get("step")}

    @cached_property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base."""
        config = self.config
        return model_fingerprint(config.base_model_name_or_path, config, config.base_model_revision)

    def settings(self, system: str, questions: QuestionSet, number: int = 0) -> dict[str, Any]:
        """All that decides a system's answers to some questions; `number` as in `answering`."""
        settings: dict[str, Any] = {
            "system": system,
            "questions": questions.fingerprint,
            "eval_batch_size": self.wanted.eval_batch_size,
            "max_new_tokens": self.wanted.max_new_tokens,
            "template_version": template_version(self.tokenizer),
        }
        if system == self.reader:
            settings["checkpoint"] = checkpoint_fingerprint(self.folder)
            if self.controls != list(CONTROLS) and not number:
                settings["controls"] = self.controls
        elif system in _METHODS:
            settings |= asdict(self.fine_tuning(system))
        elif system not in HEURISTICS:
            settings["base"] = self.base_fingerprint
        if system.removesuffix(SHUFFLED) == "prompted_examples":
            settings["examples"] = [question.id for question in self.examples]
        if number:
            settings |= {"num_contexts": number, "distractors": self.mix}
        return settings

    @cached_property
    def examples(self) -> list[Question]:
        """Worked examples for a prompt: the questions of the training split with the shortest contexts."""
        rows = self.train_questions.rows
        texts = {row.context: row for row in sorted(rows, key=lambda row: (len(row.context), row.id))}
        return list(texts.values())[:WORKED_EXAMPLES]

    def distractors(self, questions: QuestionSet) -> Distractors:
        """The distractors for a set of questions."""
        if questions.fingerprint not in self._distractors:
            made = by_number.distractors_of(questions, self.mix)
            self._distractors[questions.fingerprint] = made
        return self._distractors[questions.fingerprint]

    def answering(self, system: str, questions: QuestionSet, number: int = 0) -> System:
        """The system that answers the questions; prints how many contexts are cut to fit into a prompt.

        With a `number`, from so many contexts, the right one among them and missing (`by_number.names`).
        """
        answering = self._answering(system, questions, number)
        if number:
            for line in left_out(answering.trials):
                print(f"{system}: {line}")
        if isinstance(answering, PromptedSystem) and answering.num_cut and system != "prompted_prefix_cache":
            count = sum(map(len, map(answering.prompts, answering.trials)))
            print(
                f"{system}: {answering.num_cut} of {count} contexts were cut to fit {window(self.config)} positions"
            )
        return answering

    def _answering(self, system: str, questions: QuestionSet, number: int) -> Any:
        new_tokens = self.wanted.max_new_tokens
        if system in HEURISTICS:
            return HeuristicSystem(system.removeprefix("heuristic/"), questions)
        if system == self.reader:
            controls = by_number.names([number]) if number else self.controls
            distractors = self.distractors(questions) if number else None
            return CrossAttentionSystem(
                self.fused, self.tokenizer, questions, controls, new_tokens, distractors
            )
        model = self.model(system)
        if system == "prompted_prefix_cache":
            folder = self.output / "prefix_cache" / self.base_fingerprint
            return PrefixCachedSystem(model, self.tokenizer, questions, folder, new_tokens)
        examples = self.examples if system.removesuffix(SHUFFLED) == "prompted_examples" else []
        several = self._several(questions, number, system.endswith(SHUFFLED)) if number else None
        # Questions of one context share what the model makes of it, where that is kept in a cache.
        if kv_cache_values(model.config):
            return PrefixCachedSystem(model, self.tokenizer, questions, None, new_tokens, examples, several)
        return PromptedSystem(model, self.tokenizer, questions, new_tokens, examples, several)

    def _several(self, questions: QuestionSet, number: int, shuffled: bool) -> Several:
        """The texts that a fused model has the states of."""
        assert questions.pool is not None
        text, distractors = cache(questions.pool.text), self.distractors(questions)
        return Several(
            {
                control: [
                    None if read is None else [text(context) for context in read]
                    for read in by_number.drawn(control, questions, distractors)
                ]
                for control in by_number.names([number])
            },
            shuffled,
        )
