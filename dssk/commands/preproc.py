"""Encode the contexts of a question-answering data set once, with the frozen model that will attend to them.

    dssk preproc --embedding_model MODEL --maximum_input_length 4096 --batch_size 2 --num_proc 2 --data_cache_path DIR

writes DIR/processed_data/<name of MODEL>, which training reads. A finished folder is used again; an interrupted
one is continued by the same command.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dssk.utils.defaults import STORAGE_DTYPES
from dssk.utils.flags import Parser, bool_flag, count, optional_str, positive_int

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
    """What the flags ask for; `toy` is a data set that is made on the spot."""
    from dssk.data.preprocess import Request
    from dssk.research import toy

    return Request(**vars(args), makers={"toy": toy.splits})


def build_parser() -> Parser:
    parser = Parser(prog="dssk preproc", description=__doc__)
    model = parser.add_argument_group("the model that encodes")
    model.add_argument("--embedding_model", required=True, help="base model: a folder, or a name on the Hub")
    model.add_argument("--revision", type=optional_str, help="branch, tag or commit of a model on the Hub")
    model.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="computes in this type; auto: the model's own",
    )

    data = parser.add_argument_group("the rows")
    data.add_argument(
        "--dataset",
        default="google-research-datasets/natural_questions",
        help="name on the Hub, file, folder, or `toy`",
    )
    data.add_argument(
        "--dataset_revision", type=optional_str, help="branch, tag or commit of a data set on the Hub"
    )
    data.add_argument("--split", type=optional_str, help="read only this split of --dataset (all of them)")
    data.add_argument("--val_dataset", type=optional_str, help="where val comes from, if not from --dataset")
    data.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.05,
        metavar="SHARE",
        help="share of rows for val if there is no val; 0: train on all",
    )
    data.add_argument(
        "--max_examples",
        type=positive_int,
        metavar="ROWS",
        help="most usable rows to read of each split (all)",
    )
    data.add_argument(
        "--columns",
        type=_columns,
        default={},
        metavar="OURS=THEIRS,...",
        help="names of the columns that stand for id, title, context, question and answer, such as "
        "context=passage,answer=answers.text (their own)",
    )
    data.add_argument(
        "--skip_bad_rows",
        type=count,
        default=0,
        metavar="ROWS",
        help="malformed rows to leave out before giving up",
    )
    data.add_argument(
        "--whole_pages",
        **_SWITCH,
        help="of Natural Questions: the context is the page, cut into passages, not its long answer alone",
    )
    data.add_argument("--seed", type=count, default=0, metavar="SEED", help="of the toy data set")

    work = parser.add_argument_group("the encoding")
    work.add_argument(
        "--maximum_input_length",
        type=positive_int,
        default=4096,
        metavar="TOKENS",
        help="most of a context; longer ones become passages",
    )
    work.add_argument(
        "--passage_tokens",
        type=positive_int,
        metavar="TOKENS",
        help="contexts longer than these become passages, cut where sentences end (--maximum_input_length)",
    )
    work.add_argument(
        "--overlap",
        type=count,
        default=0,
        metavar="TOKENS",
        help="that a passage repeats of the one before it",
    )
    work.add_argument("--repeat_title", **_SWITCH, help="begin each passage with the title of its document")
    work.add_argument(
        "--truncate",
        **_SWITCH,
        help="cut longer contexts off instead, and say how many tokens are lost",
    )
    work.add_argument(
        "--batch_size", type=positive_int, default=2, metavar="CONTEXTS", help="most at a time on a device"
    )
    work.add_argument(
        "--batch_tokens",
        type=positive_int,
        default=16384,
        metavar="TOKENS",
        help="most at a time, with padding",
    )
    work.add_argument(
        "--num_proc",
        type=positive_int,
        default=1,
        metavar="PROCESSES",
        help="as many as GPUs, else as CPU cores",
    )

    result = parser.add_argument_group("the result")
    result.add_argument(
        "--data_cache_path",
        type=Path,
        required=True,
        metavar="DIR",
        help="writes processed_data/<model> in here",
    )
    result.add_argument(
        "--encode_layer",
        default="last",
        metavar="LAYER",
        help="whose input is stored; last: after the final norm; a number, a share of the depth, or two: 10+18",
    )
    result.add_argument("--storage_dtype", choices=STORAGE_DTYPES, default="bf16", help="type on the disk")
    result.add_argument(
        "--text_only",
        **_SWITCH,
        help="no encodings",
    )
    result.add_argument("--shard_rows", type=positive_int, default=256, metavar="CONTEXTS", help="in a file")
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
