"""Score a checkpoint on the questions of a data set.

Each question is answered under several controls, so that what the context contributes can be told apart from what the
model knows: only `with_context` has the right one. An interrupted evaluation continues where it stopped;
`torchrun -m dssk evaluate ...` divides the work among processes.
"""

from collections.abc import Sequence

from dssk.utils.flags import Parser, add_checkpoint, add_generation, add_scoring


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.evaluation.evaluate import evaluate_checkpoint
    from dssk.research import toy
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    evaluate_checkpoint(**vars(args), makers={"toy": toy.splits})


def build_parser() -> Parser:
    parser = Parser(prog="dssk evaluate", description=__doc__)
    add_checkpoint(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_path", metavar="DIR", help="store of questions that dssk preproc made")
    data.add_argument(
        "--dataset",
        metavar="DATA",
        help="raw questions in place of a store: whatever dssk preproc reads; contexts are encoded on the fly",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split to score (default: val, or all rows if there is none)"
    )
    add_scoring(parser)
    add_generation(parser)
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="file for the scores; predictions are written beside it, those of a.json as predictions-a.jsonl "
        "(default: scores.json and predictions.jsonl in the folder of the run or the checkpoint)",
    )
    return parser
