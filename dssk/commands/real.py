"""Write the sets of questions that `make real` trains and scores on.

    dssk real --data FOLDER --output runs/real/sets

train: SQuAD and NQ-Swap; val: a few paragraphs of SQuAD; test sets: XQuAD in English and held-out rows of NQ-Swap. Rows
that share a question or a tenth of a paragraph with a test row are left out of training.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.defaults import LONGEST_TRAINED
from dssk.utils.flags import Parser, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.research.real import write_real_sets

    write_real_sets(args.data, args.output, args.longest, args.all_questions)


def build_parser() -> Parser:
    parser = Parser(prog="dssk real", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of squad_v1_*, nq_swap_* and xquad_en_*.jsonl.gz (default: download from the Hub)",
    )
    parser.add_argument(
        "--longest",
        type=positive_int,
        default=LONGEST_TRAINED,
        metavar="CHARACTERS",
        help="longest paragraph that is trained on: short ones teach more questions a minute",
    )
    parser.add_argument(
        "--all_questions",
        action="store_true",
        help="train on all that paragraphs with few questions have, too: two hours want more questions than one",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the sets")
    return parser
