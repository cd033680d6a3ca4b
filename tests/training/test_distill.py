"""Learning from a teacher who reads the context's text."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dssk
from dssk.config import parse_experiment
from dssk.data.collate import Collator
from dssk.data.dataset import TUNED_SHARE, CrossAttnDataset
from dssk.errors import DsskError
from dssk.inference.batching import length_mask, pad_tokens
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from dssk.models.loss import IGNORED
from dssk.models.modeling import is_cross_attn
from dssk.training import distill
from dssk.training.distill import TOP_TOKENS, Teacher, for_student
from dssk.training.run import find_teacher
from tests.conftest import VOCAB_SIZE, byte_tokenizer, experiment, question_rows
from tests.families import tiny_base
from tests.training.conftest import losses

MERGED = {"reader": "merged", "encode_layer": 2, "gradient_checkpointing": False, "loss_on": "answer"}
# Rotary positions, learned ones, and a bias on attention in their place.
FAMILIES = {"llama": {}, "gpt2": {}, "bloom": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fields = {"vocab_size": VOCAB_SIZE, **FAMILIES[request.param]}
    if request.param != "bloom":
        fields["n_positions" if request.param == "gpt2" else "max_position_embeddings"] = 256
    tiny_base(request.param, folder, **fields)
    byte_tokenizer().save_pretrained(folder)
    return folder


def batch_of(contexts, prompted, texts, taught, share, pad: int = 0) -> dict[str, torch.Tensor]:
    """Texts of which the last `taught` tokens are taught, after prompts of equal ends."""
    return {
        "context_input_ids": pad_tokens(contexts, pad),
        "context_attention_mask": length_mask([len(c) for c in contexts]),
        "labels": pad_tokens([[IGNORED] * (len(t) - len(t[2:])) + t[2:] for t in texts], IGNORED),
        "teacher_input_ids": pad_tokens(prompted, pad, left=True),
        "teacher_attention_mask": length_mask([len(t) for t in prompted], left=True),
        "taught": torch.tensor(taught),
        "teacher_share": torch.tensor(share),
    }


@pytest.mark.parametrize("at_a_time", [2**27, 1])
def test_the_targets_are_what_the_teacher_says_after_the_whole_prompt(base, monkeypatch, at_a_time):
    monkeypatch.setattr(distill, "LOGITS_AT_A_TIME", at_a_time)
    model = AutoModelForCausalLM.from_pretrained(base)
    draw = lambda n: torch.randint(5, VOCAB_SIZE, (n,)).tolist()  # noqa: E731
    torch.manual_seed(0)
    contexts = [draw(9), draw(5), draw(7)]
    ends = [draw(n) for n in (4, 2, 3, 5, 3, 3)]  # two rows a context
    texts, prompted = (
        [draw(3) + e for e in ends],
        [draw(n) + e for n, e in zip((1, 3, 2, 2, 1, 2), ends, strict=True)],
    )
    taught, share = [4, 2, 0, 5, 0, 0], [0.5, 1.0, 0.0, 1.0, 0.0, 0.0]
    batch = batch_of(contexts, prompted, texts, taught, share)
    tokens, shares = Teacher(model).soft_targets(batch)
    assert tokens.shape == (6, 8, 1 + TOP_TOKENS)
    torch.testing.assert_close(shares.sum(-1), torch.ones(6, 8))
    for row, (text, prompt) in enumerate(zip(texts, prompted, strict=True)):
        with torch.no_grad():
            whole = torch.tensor([contexts[row // 2] + prompt])
            logits = (
                model.eval()(whole).logits[0, -taught[row] - 1 : -1]
                if taught[row]
                else torch.zeros(0, VOCAB_SIZE)
            )
        places = range(len(text) - taught[row] - 1, len(text) - 1)
        for place, wanted in zip(places, logits, strict=True):
            best = wanted.topk(TOP_TOKENS)
            assert tokens[row, place, 0] == text[place + 1]
            assert tokens[row, place, 1:].tolist() == best.indices.tolist()
            want = share[row] * best.values.softmax(-1)
            torch.testing.assert_close(shares[row, place, 1:], want, atol=1e-5, rtol=1e-4)
        others = [place for place in range(8) if place not in places]
        assert (shares[row, others, 0] == 1).all()


@pytest.mark.parametrize("online", [False, True])
def test_a_document_is_divided_into_what_is_read_and_what_is_learned(base_path, store_path, online):
    from dssk.store.dataset import load_rows

    rows, tokenizer = load_rows(store_path)["train"], load_tokenizer(base_path)
    cfg = parse_experiment(experiment(base_path, train_on="both", distill=True, encode_online=online))
    dataset = CrossAttnDataset(rows, tokenizer, cfg, training=True)
    assert len(dataset) == 2 * len(rows)
    assert len(CrossAttnDataset(rows, tokenizer, cfg, training=False)) == len(rows)
    seen = set()
    for epoch in range(4):
        dataset.set_epoch(epoch)
        example, question = dataset[len(rows) + 2], dataset[2]
        tokens = tokenize_context(tokenizer, rows[2]["context"])
        assert example["context_input_ids"] + example["input_ids"] == tokens
        assert example["teacher_input_ids"] == example["labels"] == example["input_ids"]
        assert (example["taught"], example["teacher_share"]) == (len(example["input_ids"]) - 1, 1.0)
        assert (question["taught"], question["teacher_share"]) == (
            0,
            0.0,
        )  # an answer's label is all there is to say
        count = len(example["context_input_ids"])
        if not online:
            assert torch.equal(example["encoder_hidden_states"], rows[2]["encoder_hidden_states"][:count])
        seen.add(count)
        assert 0.2 * len(tokens) < count < 0.8 * len(tokens)
    assert len(seen) > 1


def test_a_tuned_teacher_decides_half_of_an_answer(base_path, store_path):
    from dssk.store.dataset import load_rows

    rows, tokenizer = load_rows(store_path)["train"], load_tokenizer(base_path)
    cfg = parse_experiment(experiment(base_path, distill="tuned", context_size=64))
    example = CrossAttnDataset(rows, tokenizer, cfg, training=True)[2]
    asked = f" \n question: {rows[2]['question']} \n answer: {rows[2]['answer']}<|endoftext|>"
    assert tokenizer.decode(example["teacher_input_ids"]) == asked
    assert (
        tokenizer.decode(example["input_ids"][-example["taught"] :]) == f" {rows[2]['answer']}<|endoftext|>"
    )
    assert example["teacher_share"] == TUNED_SHARE


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
def test_documents_alone_teach_a_reader_and_nothing_else(base):
    tokenizer = load_tokenizer(base)
    texts = [row["context"] for row in question_rows(24)]
    rows = [{"context": text, "question": "", "answer": ""} for text in texts]
    cfg = parse_experiment(experiment(base, train_on="documents", distill=True, encode_online=True, **MERGED))
    dataset = CrossAttnDataset(rows, tokenizer, cfg, training=True)  # type: ignore[arg-type]
    batch = Collator(0)([dataset[i] for i in range(24)])
    torch.manual_seed(0)
    model = dssk.from_base(base, reader="merged", encode_layer=2, decoder_lora={"rank": 2}).train()
    with torch.no_grad():
        model.cross_attn_blocks[0].up.weight.normal_(std=0.3)  # far from what the base would make of the text
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = Teacher(find_teacher(cfg, model)).soft_targets(batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(12):
        loss = model(**for_student(batch), soft_targets=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.15
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert all(map(is_cross_attn, changed))
    # The teacher is the base: adapters that have learned do not act in what it says.
    after = Teacher(find_teacher(cfg, model)).soft_targets(batch)
    assert all(map(torch.equal, after, targets))


def test_a_run_distils_documents_and_questions_from_adapters(run, base_path, tmp_path, store_path):
    import peft

    tuned = AutoModelForCausalLM.from_pretrained(base_path)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    peft.get_peft_model(tuned, config).save_pretrained(tmp_path / "tuned")
    settings = {"learning_rate": 3e-3, "cross_attn_dropout_prob": 0.0, "train_on": "both"}
    folder = run("--steps", "6", "--log_every", "3", distill=str(tmp_path / "tuned"), **settings)
    seen = losses(folder)
    assert seen[6] < seen[3]
    assert all(map(is_cross_attn, load_file(folder / "checkpoint-6" / "model.safetensors")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": True}, "set train_on to documents or both, or distill to the folder of a tuned model"),
        ({"distill": True, "train_on": "both", "label_smoothing_factor": 0.1}, "soft labels already"),
        ({"distill": 3, "train_on": "both"}, "distill"),
        ({"distill": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_teach_is_refused(run, monkeypatch, changes, message):
    monkeypatch.setattr("dssk.training.run.build_model", None)  # before anything is loaded
    with pytest.raises(DsskError, match=message):
        run("--steps", "1", **changes)


def test_a_teacher_of_another_vocabulary_is_refused(run, tmp_path):
    tiny_base("llama", tmp_path / "other")
    with pytest.raises(
        DsskError, match=r"other knows 64 tokens, .* knows 261: want a teacher that was tuned from"
    ):
        run("--steps", "1", distill=str(tmp_path / "other"))
