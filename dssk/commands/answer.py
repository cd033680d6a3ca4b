"""Answer questions from contexts that were encoded before, or from a text.

    dssk answer --checkpoint C --context FILE --question "..."
    dssk answer --checkpoint C --library DIR                       # ask, and read the answers as they come
    dssk answer --checkpoint C --library DIR --input QUESTIONS.jsonl --output ANSWERS.jsonl

Without --context_id the library is searched (BM25) for each question. A line of --input has "question" and, at will,
"context_id" (one or a list); it comes back with "answer", "context_ids" and "sources": each context with its place in
its document, its share of the attention and the span most attended to. A question that no context shares a word with is
answered without one, which is said first ("nothing_found"); "context_ids" is empty then.
"""

from argparse import Namespace
from collections.abc import Sequence

from dssk.errors import DsskError
from dssk.utils.defaults import BATCH_SIZE, MAX_NEW_TOKENS
from dssk.utils.flags import Parser, count, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check(args)
    from dssk.demo.asking import ask
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    ask(**vars(args))


def check(args: Namespace) -> None:
    """Refuse flags that contradict each other, before anything is loaded."""
    if args.context_id and not args.library:
        raise DsskError("--context_id names a context of a library: pass --library as well")
    if args.input and args.question:
        raise DsskError("got --question and --input, want one of them")
    if args.library and (args.passage_tokens or args.overlap or args.truncate):
        raise DsskError(
            "--passage_tokens, --overlap and --truncate are for --context: a library has its passages"
        )
    if args.output and not args.input:
        raise DsskError("--output is for the answers to --input: pass that as well")
    if args.context and "-" in args.context and not (args.input or args.question):
        raise DsskError("--context - leaves no standard input to ask on: pass --question or --input")


def build_parser() -> Parser:
    parser = Parser(prog="dssk answer", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="checkpoint, fused model, or a run's folder"
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--library", metavar="DIR", help="contexts of dssk library, or a prepared data set")
    sources.add_argument(
        "--context",
        metavar="FILE",
        action="append",
        help="text (UTF-8), - for standard input; may be given several times",
    )
    parser.add_argument(
        "--context_id",
        metavar="ID",
        action="append",
        help="context of the library for all questions; may be given several times",
    )
    parser.add_argument(
        "--k",
        type=positive_int,
        metavar="CONTEXTS",
        help="that the search picks for a question (1 of a library; all passages of texts)",
    )
    parser.add_argument(
        "--passage_tokens",
        type=positive_int,
        metavar="TOKENS",
        help="of --context: longer texts are read as passages, cut where sentences end (the model's window)",
    )
    parser.add_argument(
        "--overlap", type=count, default=0, metavar="TOKENS", help="that a passage repeats of the one before"
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="of --context: cut longer texts off instead, and say how many tokens",
    )
    parser.add_argument(
        "--question", action="append", help="may be given several times; without any, type them"
    )
    parser.add_argument("--input", metavar="FILE.jsonl", help="questions, one JSON object a line")
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="where the lines go with their answers (standard output)"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=BATCH_SIZE, metavar="QUESTIONS", help="answered at a time"
    )
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=MAX_NEW_TOKENS, metavar="TOKENS", help="longest answer"
    )
    return parser
