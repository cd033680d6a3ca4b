"""Answer questions from encoded contexts, or from a text.

    dssk answer --checkpoint C --context FILE --question "..."
    dssk answer --checkpoint C --library DIR                       # type questions, answers are streamed
    dssk answer --checkpoint C --library DIR --input QUESTIONS.jsonl --output ANSWERS.jsonl

Without --context_id the library is searched (BM25) for each question. A line of --input has "question" and may have
"context_id" (one or a list). It is written with "answer", "context_ids" and "sources": each context with its position
in its document, its share of the attention and its most attended span. If no context shares a word with a question, it
is answered without context: its line then begins with "nothing_found", and "context_ids" is empty.
"""

from argparse import Namespace
from collections.abc import Sequence

from dssk.errors import DsskError
from dssk.utils.flags import Parser, add_checkpoint, add_generation, add_passages, positive_int


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
    add = parser.add_argument
    add_checkpoint(parser)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--library", metavar="DIR", help="a library of contexts, or a store")
    sources.add_argument(
        "--context",
        metavar="FILE",
        action="append",
        help="a text to answer from (UTF-8, - for standard input); repeatable",
    )
    add(
        "--context_id",
        metavar="ID",
        action="append",
        help="context of the library to answer from, in place of a search; repeatable",
    )
    add(
        "--k",
        type=positive_int,
        metavar="CONTEXTS",
        help="contexts to retrieve for each question (default: 1 from a library, all passages of texts)",
    )
    add_passages(parser, "the model's window")
    add("--question", metavar="TEXT", action="append", help="repeatable (default: standard input)")
    add("--input", metavar="FILE.jsonl", help="file of questions, one JSON object a line")
    add("--output", metavar="FILE.jsonl", help="file for the answers to --input (default: standard output)")
    add_generation(parser)
    return parser
