"""Which parts of transformers' Trainer, private to it, training relies on: why pyproject.toml bounds its version."""

import ast
import inspect

from transformers import Trainer, TrainingArguments

from dssk.training import answers, arguments, resumable, run, state, trainer
from dssk.training.resumable import ResumableTrainer
from dssk.training.trainer import CrossAttnTrainer
from tests.conftest import REPOSITORY

OVERRIDDEN = {
    "_get_train_sampler": "the rows of a step are decided by seed and epoch, and by no rank",
    "_get_grad_norm": "a norm that is not finite names step and rows at once; no callback sees it",
    "_save_checkpoint": "checkpoints are whole or absent, hold what trains, and nothing pickled",
    "_load_from_checkpoint": "weights are restored when all engines have wrapped the model",
    "_prepare_for_training": "the one moment between wrapping and the first step, under every engine",
    "_load_rng_state": "random numbers are put back where transformers would do it, from JSON and not from a pickle",
}
CALLED = {"_evaluate", "_tr_loss", "_globalstep_last_logged"}  # of Trainer
SET = {"_n_gpu"}  # of TrainingArguments


def private(names) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_these_private_methods_are_overridden_and_exist():
    defined = vars(CrossAttnTrainer).keys() | vars(ResumableTrainer).keys()
    ours = private(defined) & private(dir(Trainer))
    assert ours == set(OVERRIDDEN)
    assert private(OVERRIDDEN) <= private(vars(Trainer))


def test_these_private_attributes_are_used_and_exist():
    source = inspect.getsource(Trainer)
    assert all(f"self.{name}" in source for name in CALLED)
    assert all(f"self.{name}" in inspect.getsource(TrainingArguments) for name in SET)
    used = set()
    for module in (answers, arguments, resumable, run, state, trainer):
        tree = ast.parse(inspect.getsource(module))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {name for name in private(names) if f"self.{name}" in source or name in SET}
    assert used - set(OVERRIDDEN) == CALLED | SET


def test_transformers_has_an_upper_bound_because_of_them():
    line = next(
        line for line in (REPOSITORY / "pyproject.toml").read_text().splitlines() if '"transformers>=' in line
    )
    assert ",<" in line.split("#")[0]


def test_the_overridden_methods_still_take_what_they_took():
    for name in OVERRIDDEN:
        theirs = inspect.signature(getattr(Trainer, name))
        ours = inspect.signature(getattr(CrossAttnTrainer, name))
        positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert any(p.kind is p.VAR_POSITIONAL for p in ours.parameters.values()) or (
            [p.name for p in positional] == list(theirs.parameters)
        ), name
