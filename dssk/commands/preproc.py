"""Encode the contexts of a question-answering data set once, with the frozen model that will attend to them.

    dssk preproc --embedding_model MODEL --maximum_input_length 4096 --batch_size 2 --num_proc 2 --data_cache_path DIR

writes DIR/processed_data/<name of MODEL>, which training reads. A finished store is reused; an interrupted one is
continued by the same command.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dssk.utils.defaults import NATURAL_QUESTIONS, STORAGE_DTYPES
from dssk.utils.flags import (
    Parser,
    add_passages,
    add_title,
    bool_flag,
    count,
    optional_str,
    positive_int,
    seed,
)

if TYPE_CHECKING:
    from dssk.data.preprocess import Request


_SWITCH: dict[str, Any] = {
    "type": bool_flag,
    "nargs": "?",
    "const": True,
    "default": False,
    "metavar": "BOOL",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.data.preprocess import preprocess

    preprocess(to_request(args))


def to_request(args: argparse.Namespace) -> "Request":
    """The request that the flags describe; `toy` is a data set that is generated."""
    from dssk.data.preprocess import Request
    from dssk.research import toy

    return Request(**vars(args), makers={"toy": toy.splits})


def build_parser() -> Parser:
    parser = Parser(prog="dssk preproc", description=__doc__)
    add = parser.add_argument_group("the model that encodes").add_argument
    add(
        "--embedding_model", required=True, metavar="MODEL", help="base model: a folder, or a name on the Hub"
    )
    add("--revision", type=optional_str, metavar="REVISION", help="branch, tag or commit of the model")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="type to compute in; auto: the model's own",
    )

    add = parser.add_argument_group("the rows").add_argument
    add(
        "--dataset", default=NATURAL_QUESTIONS, metavar="DATA", help="name on the Hub, file, folder, or `toy`"
    )
    add("--dataset_revision", type=optional_str, metavar="REVISION", help="branch, tag or commit of the data")
    add("--split", type=optional_str, metavar="NAME", help="read only this split of --dataset (default: all)")
    add(
        "--val_dataset",
        type=optional_str,
        metavar="DATA",
        help="data set for val (default: the split validation of --dataset)",
    )
    add(
        "--val_fraction",
        type=_fraction,
        default=0.05,
        metavar="SHARE",
        help="share of the rows for val where there is no such split; 0: train on all",
    )
    add(
        "--max_examples",
        type=positive_int,
        metavar="ROWS",
        help="most usable rows to read of each split (default: all)",
    )
    add(
        "--columns",
        type=_columns,
        default={},
        metavar="OURS=THEIRS,...",
        help="columns to use as id, title, context, question and answer, such as "
        "context=passage,answer=answers.text (default: columns of these names)",
    )
    add(
        "--skip_bad_rows",
        type=count,
        default=0,
        metavar="ROWS",
        help="most malformed rows to skip, not to fail",
    )
    add(
        "--whole_pages",
        **_SWITCH,
        help="Natural Questions: encode the passages of the whole page, not the long answer alone",
    )
    add("--seed", type=seed, default=0, metavar="SEED", help="of the toy data set")

    work = parser.add_argument_group("the encoding")
    add = work.add_argument
    add(
        "--maximum_input_length",
        type=positive_int,
        default=4096,
        metavar="TOKENS",
        help="maximum length of a context; longer ones become passages",
    )
    add_passages(work, "--maximum_input_length", **_SWITCH)
    add_title(work, **_SWITCH)
    add("--batch_size", type=positive_int, default=2, metavar="CONTEXTS", help="most contexts in a batch")
    add(
        "--batch_tokens",
        type=positive_int,
        default=16384,
        metavar="TOKENS",
        help="most tokens in a batch, padding included",
    )
    add(
        "--num_proc",
        type=positive_int,
        default=1,
        metavar="PROCESSES",
        help="encoding processes: one for each GPU or CPU core",
    )

    add = parser.add_argument_group("the result").add_argument
    add(
        "--data_cache_path",
        type=Path,
        required=True,
        metavar="DIR",
        help="the store is written to DIR/processed_data/<name of the model>",
    )
    add(
        "--encode_layer",
        default="last",
        metavar="LAYER",
        help="layer whose input is stored: last (after the final norm), a number, a share of the depth, or two "
        "layers, 10+18",
    )
    add("--storage_dtype", choices=STORAGE_DTYPES, default="bf16", help="type on disk")
    add("--text_only", **_SWITCH, help="store texts without encodings")
    add("--shard_rows", type=positive_int, default=256, metavar="CONTEXTS", help="contexts of each file")
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number from 0 to below 1")
    return value


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.split("=") for pair in text.split(",") if pair]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, want OURS=THEIRS,... such as context=passage")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}
