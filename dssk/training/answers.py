"""EM and F1 of generated answers during training, on a fixed sample that all ranks share the work of."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from dssk.errors import DsskError
from dssk.evaluation.metrics import exact_match, f1
from dssk.evaluation.questions import other_rows, sample
from dssk.inference.answering import answer
from dssk.inference.encoding import Encoder


class AnswerScorer:
    """Answers the sample with each question's own context and with another's: a gain from the context shows."""

    def __init__(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, limit: int
    ):
        self.rows = sample(rows, limit)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.texts = self.rows.select_columns(["context", "question", "answer", "answers"]).to_list()
        self.golds = [text["answers"] or [text["answer"]] for text in self.texts]
        self.samples: list[dict[str, Any]] = []  # of the latest evaluation
        try:
            self.wrong: list[int] | None = other_rows([text["context"] for text in self.texts])
        except DsskError:  # one context only: there is no wrong one
            self.wrong = None

    def __call__(self, trainer: Any) -> dict[str, float]:
        """Scores from 0 to 1; to be called on all ranks."""
        answers = self._answer(trainer, list(range(len(self.texts))))
        scores = self._scores(answers)
        columns = {
            "question": [t["question"] for t in self.texts],
            "answers": self.golds,
            "prediction": answers,
        }
        if self.wrong is not None:
            wrong = self._answer(trainer, self.wrong)
            scores |= {f"wrong_context_{name}": value for name, value in self._scores(wrong).items()}
            columns["prediction_from_wrong_context"] = wrong
        self.samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return scores

    def _answer(self, trainer: Any, sources: Sequence[int]) -> list[str]:
        """An answer to each question from the context of row `sources[i]`; each rank answers every n-th one."""
        ranks, me = trainer.args.world_size, trainer.args.process_index
        count = len(self.texts)
        # The same number for each rank, as sharded models generate in step.
        mine = [i % count for i in range(me, -(-count // ranks) * ranks, ranks)]
        answers: list[tuple[int, str]] = []
        model = trainer.unwrapped_model
        for start in range(0, len(mine), self.batch_size):
            rows = mine[start : start + self.batch_size]
            questions = [self.texts[i]["question"] for i in rows]
            contexts = self._contexts(model, [sources[i] for i in rows])
            with trainer.compute_loss_context_manager():
                texts = answer(model, questions, contexts, self.tokenizer, len(rows))
            answers += zip(rows, texts, strict=True)
            trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        by_row = dict(gather_object(answers))
        return [by_row[i] for i in range(count)]

    def _contexts(self, model: Any, sources: list[int]) -> list[torch.Tensor]:
        if "encoder_hidden_states" in self.rows.column_names:
            return [self.rows[row]["encoder_hidden_states"] for row in sources]
        encoder = Encoder(model, self.tokenizer)
        # One at a time: sharded models encode in step, and batches would differ in number between the ranks.
        return [encoder.encode([self.texts[row]["context"]])[0] for row in sources]

    def _scores(self, answers: Sequence[str]) -> dict[str, float]:
        pairs = list(zip(answers, self.golds, strict=True))
        return {"em": mean(exact_match(*pair) for pair in pairs), "f1": mean(f1(*pair) for pair in pairs)}
