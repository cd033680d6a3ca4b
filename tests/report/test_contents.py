import shlex

from dssk.report.contents import Contents, commands
from dssk.report.run_files import RunFiles, read_run


def contents(**fields) -> Contents:
    """Of a run without a model."""
    empty = {"experiment": {}, "metrics": [], "scores": {}, "predictions": []}
    return Contents(RunFiles(**{"folder": fields.pop("folder"), **empty, **fields}), num_samples=0)


def test_costs_are_compared_with_prompting(run_folder):
    costs = Contents(read_run(run_folder, run_folder / "compare"), num_samples=0).measured_costs()
    (own, prompted), (larger,) = costs.values()
    assert (own["system"], own["sooner"], prompted["sooner"]) == ("cross_attention", 25.0, 1.0)
    assert larger["sooner"] is None


def test_a_larger_base_is_named_by_its_settings(tmp_path):
    settings = {"hidden_size": 768, "num_hidden_layers": 12, "context_tokens": 1500}
    row = {"system": "prompted", "first_token_s": 1.0, "settings": settings}
    (name,) = contents(folder=tmp_path, cost=[row]).measured_costs()
    assert name == "Measured on a random base, 768 wide with 12 layers, at contexts of 1,500 tokens"


def test_systems_are_grouped_by_their_questions(tmp_path):
    table = [
        {"system": s, "data": d, "em": em}
        for s, d, em in (("a", "x", 0.1), ("b", "x", None), ("a", "y", 0.2))
    ]
    assert contents(folder=tmp_path, table=table).systems() == {"x": table[:1], "y": table[2:]}


def test_old_scores_without_intervals_are_shown(tmp_path):
    scores = {"with_context": {"n": 8, "em": 0.5, "f1": 0.6}, "right_beats_wrong": 0.9}
    made = contents(folder=tmp_path, scores=scores)
    assert [tile["value"] for tile in made.tiles()] == ["50.0 %", "60.0 %", "90.0 %"]
    assert set(made.figures()) == {"scores"}


def test_the_title_says_what_reads(tmp_path):
    for experiment, title in (
        ({"num_cross_attn_layers": 6}, "6 cross-attention blocks in b"),
        ({"num_cross_attn_layers": 6, "reader": "merged"}, "A merged reader in b"),
    ):
        made = contents(folder=tmp_path, experiment={"model_path": "a/b", **experiment})
        assert made.parts("run")["title"] == title


def test_hints_can_be_pasted(tmp_path):
    """Whatever the folders are called: each word arrives as it is, and a store that lies where it should is named."""
    run = tmp_path / "my runs; $HOME" / "run"
    run.mkdir(parents=True)
    hints = commands(str(run), run, "a base")
    assert shlex.split(hints["evaluate"], comments=True) == [
        *("STORE=...", "dssk", "evaluate", "--checkpoint", str(run), "--data_path", "$STORE")
    ]
    store = tmp_path / "processed_data" / "a base"
    store.mkdir(parents=True)
    (store / "manifest.json").touch()
    hints = commands(str(run), run, "a base")
    assert shlex.split(hints["evaluate"]) == [
        *("dssk", "evaluate", "--checkpoint", str(run), "--data_path", str(store))
    ]
    assert shlex.split(hints["train"]) == [
        *("dssk", "train", "--exp_id", "run", "-sb", str(run.parent), "--data_path", str(store))
    ]
    assert str(store) in shlex.split(hints["compare"])
