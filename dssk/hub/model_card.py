"""The model card of a published model: README.md, with what is known of its run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dssk.inference.loading import FusedModel
from dssk.inference.rounding import DEFAULT_STORAGE, encoding_bytes
from dssk.models.shapes import kv_cache_values, window
from dssk.utils.files import size

PARTS = {  # by the reader of a model
    "cross_attention": "cross-attention blocks",
    "merged": "maps from stored states to keys and values",
}


@dataclass(frozen=True)
class Origin:
    """The origin of a model. Of paths on this machine only the last part is shown."""

    base: str
    base_repository: str | None = None  # on the Hub
    step: int | None = None
    experiment: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    data_repository: str | None = None
    rows: dict[str, int] = field(default_factory=dict)  # split -> questions
    scores: dict[str, Any] = field(default_factory=dict)  # scores.json
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last evaluation during training


def model_card(repository: str, what: str, model: FusedModel, origin: Origin) -> ModelCard:
    """The card of `what`, "fused" or "cross_attention", as it will lie in `repository`."""
    relation = "adapter" if what == "cross_attention" else "finetune"
    data = ModelCardData(
        base_model=origin.base_repository,
        base_model_relation=relation if origin.base_repository else None,
        datasets=origin.data_repository,
        library_name="dssk",
        pipeline_tag="text-generation",
        tags=[model.config.reader.replace("_", "-"), "cached-context", "question-answering"],
        model_name=repository.split("/")[-1],
        eval_results=_eval_results(origin) or None,
    )
    sections = [
        _head(repository, what, model, origin),
        _scores(origin),
        _cost(model),
        _experiment(origin),
        f"## Licence\n\nThat of the base model, {origin.base}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _head(repository: str, what: str, model: FusedModel, origin: Origin) -> str:
    trained, total = model.trainable_parameters()
    holds = (
        f"This repository holds the trained parts alone ({trained:,} parameters); {origin.base} is loaded with them."
        if what == "cross_attention"
        else f"This repository holds all of it ({total:,} parameters), {trained:,} of which were trained."
    )
    trained_on = f" on {origin.data}" if origin.data else ""
    parts = PARTS[model.config.reader]
    about = (
        f"{origin.base}, frozen, with {parts} that were trained{trained_on} to answer from contexts. "
        f"A context is encoded once, ahead of time, and never stands in a prompt. {holds}"
    )
    return f"""# {repository.split("/")[-1]}

{about}

```python
import dssk, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("{repository}")
print(model.answer("a question", "the text to answer it from"))
```"""


def _scores(origin: Origin) -> str:
    controls = {name: row for name, row in origin.scores.items() if isinstance(row, dict)}
    if not controls:
        return _training_scores(origin)
    lines = ["| context | EM | F1 | questions |", "|---|---|---|---|"]
    for name, row in controls.items():
        em, f1 = (_with_interval(row, metric) for metric in ("em", "f1"))
        lines.append(f"| {name.replace('_', ' ')} | {em} | {f1} | {row.get('n', '')} |")
    table = "\n".join(lines)
    text = (
        "## Scores\n\nExact match and F1 as SQuAD defines them, with 95 % bootstrap intervals over contexts."
    )
    text += f"\n\n{table}"
    if "right_beats_wrong" in origin.scores:
        share = _with_interval(origin.scores, "right_beats_wrong")
        text += f"\n\nShare of questions whose answer is likelier with its own context than with another: {share}."
    return text


def _training_scores(origin: Origin) -> str:
    if "eval_em" not in origin.metrics:
        return "## Scores\n\nNot evaluated."
    em, f1 = origin.metrics["eval_em"], origin.metrics["eval_f1"]
    text = f"## Scores\n\nOn a sample of the validation questions, during training: EM {em:.3f}, F1 {f1:.3f}"
    wrong = origin.metrics.get("eval_wrong_context_em")
    return text + ("." if wrong is None else f"; with another question's context EM {wrong:.3f}.")


def _with_interval(row: dict[str, Any], metric: str) -> str:
    text = f"{row[metric]:.3f}"
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return text if low is None or high is None else f"{text} ({low:.3f} to {high:.3f})"


def _eval_results(origin: Origin) -> list[EvalResult]:
    row = origin.scores.get("with_context")
    if not row:
        return []
    name = origin.data or "its validation questions"
    return [
        EvalResult(
            "question-answering",
            origin.data_repository or "private",
            name,
            kind,
            row[metric],
            metric_name=shown,
        )
        for metric, kind, shown in (("em", "exact_match", "EM"), ("f1", "f1", "F1"))
    ]


def _cost(model: FusedModel) -> str:
    config = model.config
    kept = encoding_bytes(DEFAULT_STORAGE, config.states_width)
    cache = kv_cache_values(config) * torch.bfloat16.itemsize
    places = "no place" if config.reader == "cross_attention" else "its places, as in a prompt,"
    return (
        f"## Cost\n\nAn encoded context takes {size(kept)} a token in bfloat16, the base's keys and values would take "
        f"{size(cache)}. It takes {places} among the {window(config):,} positions of the decoder."
    )


def _experiment(origin: Origin) -> str:
    if not origin.experiment:
        return ""
    lines = ["## Training", ""]
    if origin.rows:
        lines += [
            f"{', '.join(f'{count:,} questions in {split}' for split, count in origin.rows.items())}.",
            "",
        ]
    settings = {**origin.experiment, "model_path": origin.base}
    if isinstance(teacher := settings.get("distill"), str):
        settings["distill"] = Path(teacher).name
    if origin.step is not None:
        settings = {"steps": origin.step, **settings}
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in settings.items()]
    return "\n".join(lines)
