"""Score a checkpoint on the questions of a data set.

Each question is answered under several controls. A gain that comes from the context shows under `with_context` and
not under the others. A run that was killed goes on where it stopped; `torchrun -m dssk evaluate ...` shares the work
among processes.
"""

from collections.abc import Sequence

from dssk.utils.defaults import BATCH_SIZE, CONTROLS, MAX_NEW_TOKENS
from dssk.utils.flags import Parser, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.evaluation.evaluate import evaluate_checkpoint
    from dssk.research import toy
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    evaluate_checkpoint(**vars(args), makers={"toy": toy.splits})


def build_parser() -> Parser:
    parser = Parser(prog="dssk evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="checkpoint, fused model, or a run's folder"
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_path", metavar="DIR", help="folder that dssk preproc made")
    data.add_argument(
        "--dataset",
        help="raw questions instead, as dssk preproc reads them, or `toy`; encoded on the fly",
    )
    parser.add_argument("--split", help="split to score (val; all, where there is none)")
    parser.add_argument(
        "--controls", default=",".join(CONTROLS), help="with commas between; default: all, %(default)s"
    )
    parser.add_argument(
        "--num_contexts",
        metavar="N,N,...",
        help="answer also from so many contexts at a time, the right one among others and missing (none)",
    )
    parser.add_argument(
        "--distractors",
        default="random",
        metavar="SOURCE,...",
        help="where the others come from: document, neighbours (by the question's words), random (%(default)s)",
    )
    parser.add_argument(
        "--max_questions",
        type=positive_int,
        metavar="QUESTIONS",
        help="score this many, spread over the split (all)",
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=BATCH_SIZE,
        metavar="QUESTIONS",
        help="answered at a time, fewer where contexts are long",
    )
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=MAX_NEW_TOKENS, metavar="TOKENS", help="longest answer"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="where scores go; predictions lie beside (scores.json in the run or the checkpoint)",
    )
    return parser
