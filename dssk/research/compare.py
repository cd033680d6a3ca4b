"""Comparing cached contexts with prompting and fine-tuning on the same base.

Systems: the fused model, by the name of its reader (`cross_attention` or `merged`); its base with the context in the
prompt (`prompted`) and with the context's KV cache read from disk (`prompted_prefix_cache`); the base fine-tuned on
such prompts with LoRA (`lora_prompted`) or whole (`full_prompted`); `prompted_examples` has two-shot prompts.
The fused model is also scored under controls, two heuristics need no model, and if numbers of contexts are given,
questions read several at a time. Finished results are kept: the same command continues where it was stopped.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.predictions import answer_all, discard_partial
from dssk.evaluation.questions import QuestionSet, check_encodings, load_questions, spread
from dssk.evaluation.scores import score
from dssk.models.shapes import window
from dssk.research import cost, paired, several
from dssk.research.prompted import cache_bytes_per_token, few_shot, make_prompt
from dssk.research.systems import HEURISTICS, SHUFFLED, Comparison, Systems
from dssk.run_folder import predictions_of
from dssk.utils import files
from dssk.utils.defaults import CONTROLS, FURTHER_SYSTEMS, SYSTEMS
from dssk.utils.flags import nearest
from dssk.utils.json_files import read_json
from dssk.utils.ranks import Ranks

TABLE, COST = "table.json", "cost.json"
TIMED_QUESTIONS = 9
COST_COLUMNS = ("trained_parameters", "bytes_per_context_token", "first_token_s", "tokens_per_s")

Row = dict[str, Any]


def compare(wanted: Comparison) -> list[Row]:
    """Answer with every system, measure what answering costs, and write the table."""
    numbers = by_number.parse_numbers(wanted.num_contexts) if wanted.num_contexts else []
    systems = Systems(wanted)
    names = system_list(wanted.systems, systems.reader)
    together = several.systems_of(names, systems.reader) if numbers else []
    files.make_folder(systems.output)
    sets = question_sets(systems)
    for questions in sets.values() if numbers else ():
        # A source that the data do not have is refused before anything is answered.
        systems.distractors(questions)
    scores = {
        (data, name): answer(systems, name, data, questions)
        for name in [*names, *HEURISTICS]
        for data, questions in sets.items()
    }
    costs = measure_costs(systems, names, next(iter(sets.values())))
    table = [
        row
        for data, questions in sets.items()
        for name in [*names, *HEURISTICS]
        for row in rows_of(
            name, data, scores[data, name], costs.get(name, {}), systems.settings(name, questions)
        )
    ]
    if systems.reader in names:
        others = {*names, *HEURISTICS} - {systems.reader}
        for data in sets:
            set_beside_the_checkpoint(
                systems, [row for row in table if row["data"] == data and row["system"] in others], data
            )
    for data, questions in sets.items():
        for number in numbers:
            table += rows_by_number(systems, together, data, questions, number)
    files.write_json(systems.output / TABLE, table)
    return table


def rows_by_number(
    systems: Systems, names: Sequence[str], data: str, questions: QuestionSet, number: int
) -> list[Row]:
    """The rows of table.json of questions that read so many contexts at a time."""
    # One context has but one order.
    same = {name: name if number > 1 else name.removesuffix(SHUFFLED) for name in names}
    scores = {name: answer(systems, same[name], data, questions, number) for name in names}
    costs = several.costs(systems, names, data, questions, number)
    rows = [
        row
        for name in names
        for row in several.rows(
            name, data, number, scores[name], costs[name], systems.settings(name, questions, number)
        )
    ]
    return sorted(rows, key=lambda row: not row["gold"])


def question_sets(systems: Systems) -> dict[str, QuestionSet]:
    """The sets to score on by name: `val` of the store, then those of `--eval`."""
    wanted = systems.wanted
    paths = {"val": wanted.data_path}
    for entry in wanted.eval:
        name, separator, path = entry.partition("=")
        if not separator or not name.replace("_", "").replace("-", "").isalnum() or name in paths:
            raise DsskError(
                f"--eval got {entry!r}, want name=STORE_OR_FILE with a new name of letters and digits"
            )
        paths[name] = path
    for path in paths.values():
        check_encodings(path, systems.folder)
    return {
        name: load_questions(
            path,
            systems.tokenizer,
            systems.config,
            limit=wanted.max_questions,
            with_pool=bool(wanted.num_contexts),
        )
        for name, path in paths.items()
    }


def answer(systems: Systems, name: str, data: str, questions: QuestionSet, number: int = 0) -> dict[str, Any]:
    """The scores (see `scores.score`) of a system on a set of questions; answered unless that was done before.

    With a `number`, those with so many contexts at a time (see `several.scored`).
    """
    settings = systems.settings(name, questions, number)
    file, path = files_of(systems, name, data, number)
    kept = read_json(file, dict) if file.is_file() and path.is_file() else {}
    if kept.get("settings") == settings and "scores" in kept:
        return kept["scores"]
    system = systems.answering(name, questions, number)
    # As many contexts at a time as otherwise.
    batch_size = max(1, systems.wanted.eval_batch_size // max(1, number))
    predictions = answer_all(questions, system, path, settings, batch_size, Ranks(0, 1, 0))
    scores = several.scored(system, predictions, number) if number else score(predictions, CONTROLS)
    files.write_json(file, {"settings": settings, "scores": scores})
    discard_partial(path)
    return scores


def files_of(systems: Systems, name: str, data: str, number: int = 0) -> tuple[Path, Path]:
    """Where the scores and the predictions of a system on a set of questions are kept."""
    scores = systems.folder_of(number) / f"scores-{data}-{name.replace('/', '-')}.json"
    return scores, predictions_of(scores)


def set_beside_the_checkpoint(systems: Systems, rows: Sequence[Row], data: str) -> None:
    """Add to the rows of other systems how their F1 differs from the checkpoint's on the same questions."""
    reference = paired.read(files_of(systems, systems.reader, data)[1])
    for row in rows:
        row |= paired.f1_difference(paired.read(files_of(systems, row["system"], data)[1]), reference)


def measure_costs(systems: Systems, names: Sequence[str], questions: QuestionSet) -> dict[str, Row]:
    """The cost columns of all systems, measured together on some of the questions."""
    before = few_shot(systems.tokenizer, systems.examples) if "prompted_examples" in names else []
    positions = window(systems.config) - len(before)
    chosen = [
        make_prompt(systems.tokenizer, questions.rows[i], positions, cost.NEW_TOKENS)
        for i in spread(len(questions), TIMED_QUESTIONS)
    ]
    num_bytes = dict.fromkeys(names, 0)
    timed: dict[str, cost.Generate] = {}
    with tempfile.TemporaryDirectory(dir=systems.output) as folder:
        for name in names:
            model = systems.model(name)
            if name == systems.reader:
                timed[name] = cost.cross_attending(systems.fused, chosen, Path(folder) / "states")
                num_bytes[name] = questions.bytes_per_context_token
            elif name == "prompted_prefix_cache":
                timed[name] = cost.prefix_cached(model, chosen, Path(folder) / "prefix_cache")
                num_bytes[name] = cache_bytes_per_token(model)
            else:
                timed[name] = cost.prompting(model, before if name == "prompted_examples" else [])
        seconds = cost.measure(timed, chosen)
    return {
        name: {
            "trained_parameters": systems.trained_parameters(name),
            "bytes_per_context_token": num_bytes[name],
            **seconds[name],
        }
        for name in names
    }


def rows_of(name: str, data: str, scores: dict[str, Any], costs: Row, settings: dict[str, Any]) -> list[Row]:
    """A system's row of table.json for one set of questions, then those of its controls, which cost nothing more."""
    rows: list[Row] = []
    for control, scored in scores.items():
        if not isinstance(scored, dict):
            continue
        own = control == "with_context"
        row: Row = {"system": name if own else f"{name}/{control}", "data": data}
        row |= {key: value for key, value in scored.items() if not key.startswith("by_")}
        row |= {column: costs.get(column) if own else None for column in COST_COLUMNS}
        if own:
            row["settings"] = settings
        rows.append(row)
    rows[0] |= {key: value for key, value in scores.items() if key.startswith("right_beats_wrong")}
    return rows


def render(rows: Sequence[Row]) -> str:
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


def render_differences(rows: Sequence[Row]) -> str:
    """A line for each set: how the F1 of other systems differs from the checkpoint's, question by question."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "f1_difference" in row:
            found.setdefault(row["data"], []).append(
                f"{row['system']} {row['f1_difference']:+.3f} "
                f"({row['f1_difference_low']:+.3f}..{row['f1_difference_high']:+.3f})"
            )
    return "\n".join(
        f"{data}, F1 beside the checkpoint's on the same questions: {', '.join(systems)}"
        for data, systems in found.items()
    )


def _cell(row: Row, key: str, style: str) -> str:
    return "" if row.get(key) is None else format(row[key], style)


def system_list(text: str | None, reader: str) -> list[str]:
    """Parse the names of systems, divided by commas; the checkpoint goes by the name of its reader."""
    known = (reader, *SYSTEMS, *FURTHER_SYSTEMS)
    names = [reader, *SYSTEMS] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise DsskError(f"no system {name!r}{nearest(name, known)}: want some of {','.join(known)}")
    return [system for system in known if system in names]


def compare_and_show(wanted: Comparison) -> None:
    """Run `dssk compare`."""
    output = Path(wanted.output)
    with files.only_writer(output / TABLE):
        table = compare(wanted)
        print(render([row for row in table if "num_contexts" not in row]))
        if differences := render_differences(table):
            print(differences)
        if together := [row for row in table if "num_contexts" in row]:
            print(several.render(together))
        print(output / TABLE)
        show_medium_cost(output / COST, wanted.medium_cost)


def show_medium_cost(file: Path, measure: bool) -> None:
    """Print what a larger model's answers cost; `measure` it unless that was done before."""
    if measure and not file.is_file():
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            files.write_json(file, cost.medium(Path(folder)))
    if file.is_file():
        print(f"random weights, contexts of {cost.MEDIUM_CONTEXT} tokens")
        print(f"{render(read_json(file, list))}\n{file}")
