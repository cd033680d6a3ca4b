"""Writes the folders beside this file with version 0.1, which present code must go on reading.

    git worktree add /tmp/dssk-0.1-code 493a01d
    mkdir /tmp/dssk-0.1 && cd /tmp/dssk-0.1 && PYTHONPATH=/tmp/dssk-0.1-code python REPOSITORY/tests/v01/make.py
    cp -r * REPOSITORY/tests/v01/

What names the base by its whole path (the library, the checkpoint) says `/tmp/dssk-0.1/base`. `expected.safetensors`
holds what 0.1 itself read and computed from the files.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dssk.checkpoint import load_model
from dssk.cli import parse_args
from dssk.data import preproc_nq
from dssk.data.store import load_rows
from dssk.library import ContextLibrary
from dssk.training.run import train
from tests.conftest import experiment, make_base

TOWNS = ["Aston", "Brill", "Corfe", "Dunster", "Ely", "Frome"]
LIBRARY = {
    "mill": ("A mill", "The mill of Aston was built in 1701."),
    "bridge": ("", "The bridge of Ely is long."),
}


def rows() -> list[dict]:
    """Two questions about each of six towns."""
    return [
        {"id": f"{town}-{kind}", "context": text, "question": f"{kind} has {town}", "answer": answer}
        for number, town in enumerate(TOWNS)
        for text in [f"{town} has {number + 2} mills and the {town} bridge."]
        for kind, answer in (("how many mills", str(number + 2)), ("which bridge", f"the {town} bridge"))
    ]


def main() -> None:
    make_base(Path("base"), n_layer=2, n_inner=64, n_positions=128)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    preproc_nq.main(
        "--dataset rows.jsonl --embedding_model base --data_cache_path . --maximum_input_length 64 "
        "--val_fraction 0.3 --shard_rows 4".split()
    )
    shutil.move("processed_data/base", "store")

    library = ContextLibrary("library", model="base", maximum_input_length=64)
    for id, (title, text) in LIBRARY.items():
        library.add([text], ids=[id], titles=[title])

    fields = {"num_cross_attn_layers": 1, "cross_attn_hidden_size": 16, "cross_attn_num_attention_heads": 2}
    groups = {"small": [experiment(Path("base"), **fields, cross_attn_init="normal")]}
    train(parse_args("-e small -sb runs --data_path store --steps 2 --log_every 2".split()), groups)
    (run,) = (path for path in Path("runs").iterdir() if path.is_dir())
    for name in ("checkpoint-2", "final"):
        shutil.move(run / name, name)

    expected = {}
    for split, table in load_rows("store").items():
        expected |= {f"store/{split}/{row['context']}": row["encoder_hidden_states"].clone() for row in table}
    for id in library:
        expected[f"library/{id}"] = library.get(id).encoder_hidden_states.clone()
    model, tokenizer = load_model("final")
    prompt = tokenizer("question: how many mills has Ely \n answer: ", return_tensors="pt")["input_ids"]
    states = library.get("bridge").encoder_hidden_states[None].float()
    with torch.no_grad():
        expected["logits/none"] = model(prompt).logits[0, -1].clone()
        expected["logits/bridge"] = model(prompt, encoder_hidden_states=states).logits[0, -1].clone()
        expected["generated/bridge"] = model.generate(
            prompt, encoder_hidden_states=states, max_new_tokens=8, do_sample=False, pad_token_id=4
        )
    save_file(expected, "expected.safetensors")
    for name in ("processed_data", "runs"):
        shutil.rmtree(name)


if __name__ == "__main__":
    main()
