"""Write the sets of questions that `make real` trains and scores on.

    dssk real --data FOLDER --output runs/real/sets

SQuAD and NQ-Swap to train on, a few paragraphs to watch training by, and all of XQuAD in English and held-out NQ-Swap
to be scored. Nothing that is scored is trained on: rows that share a question, or a tenth of a paragraph, are left out.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.research.real import write_real_sets

    write_real_sets(args.data, args.output)


def build_parser() -> Parser:
    parser = Parser(prog="dssk real", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder that holds squad_v1_*, nq_swap_* and xquad_en_*.jsonl.gz (from the Hub)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the sets")
    return parser
