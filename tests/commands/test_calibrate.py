"""`dssk calibrate` and `dssk restore`, from text to a plain model that goes on from the file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, GPTBigCodeForCausalLM

from dssk.commands import calibrate, publish, restore
from dssk.errors import DsskError
from dssk.inference.calibrate import LayerScore, Scan
from dssk.inference.loading import load_base, load_model
from dssk.inference.tokenizer import tokenize_context

WORDS = "mill river amber falls stone bridge old town was built near the by a".split()


def paragraph(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (40,), generator=generator))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "notes.txt").write_text("\n\n".join(paragraph(seed) for seed in range(10)))
    rows = [{"context": paragraph(seed), "question": "q", "answer": "a"} for seed in (0, 20, 21, 22)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "notes.txt"), str(folder / "rows.jsonl")]


@pytest.fixture(scope="module")
def calibrated(base_path, texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "calibrated"
    calibrate.main(["--base", str(base_path), "--text", *texts, "--output", str(output), "--held_out", "2"])
    return output


def test_a_calibrated_base_is_a_model_that_reads_with_its_best_layer(calibrated):
    report = json.loads((calibrated / "calibration.json").read_text())
    assert [layer["layers"] for layer in report["layers"]] == [[1], [2], [3], [4]]
    best = min(report["layers"], key=lambda layer: layer["nll"])
    assert report["recommended"] == best["layers"]
    assert (calibrated / "layers.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load_model(calibrated)
    assert model.config.reader == "merged"
    assert list(model.config.encode_layers) == best["layers"]
    ids = torch.tensor([tokenize_context(tokenizer, paragraph(50))])
    states, mask = model.encode(ids)
    context = model.project_context(states, mask)
    assert all(keys.abs().sum() > 0 for keys in context.keys)
    text = ids[:, :9]
    assert not torch.allclose(model(text, context=context).logits, model(text).logits)
    assert model.generate(text, context=context, max_new_tokens=3, min_new_tokens=3).shape == (1, 12)


def test_a_calibrated_base_is_as_its_base_and_can_be_published(base_path, texts, tmp_path):
    """Texts as long as the base reads; computed in another type than the base has."""
    (tmp_path / "long.txt").write_text("\n\n".join(3 * paragraph(seed) for seed in range(60, 66)))
    output, files = tmp_path / "out", ["--text", str(tmp_path / "long.txt")]
    calibrate.main(
        ["--base", str(base_path), *files, "--output", str(output), "--dtype", "bf16", "--encode_layer", "2"]
    )
    assert load_model(output)[0].dtype == load_base(str(base_path)).dtype
    publish.main(["--checkpoint", str(output), "--repo", "someone/mill", "--output", str(tmp_path / "card")])
    assert (tmp_path / "card" / "README.md").is_file()


def test_a_text_that_is_too_long_for_a_cache_is_refused(calibrated, tmp_path):
    (tmp_path / "long.txt").write_text(paragraph(1) * 5)
    flags = ["--checkpoint", str(calibrated), "--context", str(tmp_path / "long.txt")]
    with pytest.raises(DsskError, match=r"has [\d,]+ tokens, of the model's 256 positions none is left"):
        restore.main([*flags, "--output", str(tmp_path / "cache.safetensors")])


@torch.no_grad()
def test_a_restored_cache_gives_a_plain_model_our_logits(calibrated, base_path, tmp_path):
    (tmp_path / "a.txt").write_text(paragraph(51))
    (tmp_path / "b.txt").write_text(paragraph(52)[:60])
    output = tmp_path / "cache.safetensors"
    files = ["--context", str(tmp_path / "a.txt"), "--context", str(tmp_path / "b.txt")]
    restore.main(["--checkpoint", str(calibrated), *files, "--output", str(output)])
    file, plain = load_file(output), GPTBigCodeForCausalLM.from_pretrained(base_path).eval()
    cache = DynamicCache(config=plain.config)
    for layer in range(plain.config.num_hidden_layers):
        cache.update(file[f"keys.{layer}"], file[f"values.{layer}"], layer)
    model, tokenizer = load_model(calibrated)
    text = torch.tensor([tokenize_context(tokenizer, "a town")] * 2)
    got = plain(
        text,
        past_key_values=cache,
        attention_mask=torch.cat([file["mask"].long(), torch.ones_like(text)], 1),
        position_ids=file["lengths"][:, None] + torch.arange(text.shape[1]),
    ).logits
    from dssk.inference.batching import pad_states
    from dssk.inference.encoding import Encoder

    states, mask = pad_states(
        Encoder(model, tokenizer, maximum_input_length=256).encode([paragraph(51), paragraph(52)[:60]])
    )
    torch.testing.assert_close(
        got, model(text, encoder_hidden_states=states, encoder_attention_mask=mask).logits
    )


def test_what_cannot_be_is_refused_in_one_line(base_path, texts, calibrated, tmp_path, capsys):
    flags = ["--base", str(base_path), "--text", *texts, "--output", str(tmp_path / "new")]
    for more, message in (
        (["--encode_layer", "9"], "encode_layer is 9, want 'last', a layer from 1 to 4"),
        (["--encode_layer", "1+2+3"], "want auto, one layer, or two, 10"),
        (["--encode_layer", "1+auto"], "encode_layer is .auto., want .last., a layer from 1 to 4"),
        (["--text", str(tmp_path / "none.txt")], "no such file"),
        (["--output", str(calibrated)], "is not empty"),
        (["--encode_layer", "1+2", "--rank", "65"], "--rank 65 is more than the 64 values of a state"),
    ):
        with pytest.raises(DsskError, match=message):
            calibrate.main([*flags, *more])
    with pytest.raises(DsskError, match="go together"):
        restore.main(["--checkpoint", str(calibrated), "--library", str(tmp_path), "--output", "x"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("nlls", "said"),
    [
        (
            (3.2, 3.0, 4.0),
            "3.200 nats a token read from them, 3.000 in the prompt and 4.000 unread: 80% of the way.",
        ),
        ((5.81, 5.82, 5.80), "this base makes nothing of a context."),
    ],
)
def test_the_way_is_named_only_where_the_prompt_goes_one(nlls, said):
    best = LayerScore((2,), nlls[0], 0.8)
    found = Scan([best], prompted_nll=nlls[1], unread_nll=nlls[2], tokens=100, best=best, reader=None)
    assert calibrate.summary(found, Path("calibrated")).endswith(said)
