"""A library of encoded contexts that grows.

    dssk library DIR add --checkpoint C FILE ...
    dssk library DIR list
    dssk library DIR search "when was amber falls founded"
    dssk library DIR remove ID ...
    dssk library DIR verify

A folder made by dssk preproc opens as a library that can only be read.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dssk.utils.defaults import STORAGE_DTYPES
from dssk.utils.flags import Parser, add_passages, add_title, positive_int

if TYPE_CHECKING:
    from dssk.store.library import Context


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.store.library import ContextLibrary
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    if args.command == "add":
        add(args)
        return
    library = ContextLibrary(args.library)
    if args.command == "list":
        for id in library:
            print(describe(library.get(id)))
        if not len(library):
            print(f"dssk: {args.library} holds no contexts", file=sys.stderr)
    elif args.command == "search":
        hits = library.search(args.question, args.k)
        for hit in hits:
            print(f"{hit.score:6.2f}  {describe(library.get(hit.id))}")
        if not hits:
            print("dssk: no context shares a word with the question", file=sys.stderr)
    elif args.command == "remove":
        library.remove(args.ids)
    else:
        library.verify()
        print(f"{args.library}: {len(library)} contexts are as they were written")


def add(args: argparse.Namespace) -> None:
    from dssk.data.contexts import read_contexts
    from dssk.inference.passages import Splitter
    from dssk.store.library import ContextLibrary

    rows = [row for file in args.files for row in read_contexts(file)]  # before a new library is begun
    library = ContextLibrary(
        args.library,
        args.checkpoint,
        storage_dtype=args.storage_dtype,
        maximum_input_length=args.maximum_input_length,
    )
    ids, titles, texts = zip(*rows, strict=True)
    longest = library.manifest.maximum_input_length
    splitter = Splitter(args.passage_tokens or longest, args.overlap, args.repeat_title)
    lost: list[int] = []  # tokens of each text that was cut
    for id in library.add(texts, ids, titles, splitter, args.truncate):
        context = library.get(id)
        print(describe(context))
        if context.truncated:
            lost.append(library.num_tokens(context.text) - context.n_tokens)
    if lost:
        print(
            f"dssk: {sum(lost)} tokens of {len(lost)} texts are lost, which --truncate cut to {longest}: without it "
            "they become passages",
            file=sys.stderr,
        )


def describe(context: "Context") -> str:
    """One line about a context."""
    cut = " (cut)" if context.truncated else ""
    place = f" (characters {context.start} to {context.end})" if context.document else ""
    begins = context.title or " ".join(context.text.split())[:60]
    return f"{context.id}\t{context.n_tokens} tokens{cut}{place}\t{begins}"


def build_parser() -> Parser:
    parser = Parser(prog="dssk library", description=__doc__)
    parser.add_argument("library", metavar="DIR", help="folder of the library, or a store")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="add|list|search|remove|verify", help="what to do"
    )

    add = commands.add_parser("add", help="encode contexts and store them")
    add.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="text (UTF-8), whose name becomes the id; or rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow) with "
        "context or text and, optionally, id and title; .gz and .zst are decompressed",
    )
    add.add_argument(
        "--checkpoint",
        metavar="C",
        help="of a new library, the model that encodes: a base, a checkpoint, a fused model, or a run's folder",
    )
    add.add_argument(
        "--storage_dtype", choices=STORAGE_DTYPES, default="bf16", help="of a new library: type on disk"
    )
    add.add_argument(
        "--maximum_input_length",
        type=positive_int,
        metavar="TOKENS",
        help="of a new library: maximum length of a context (default: the model's window)",
    )
    add_passages(add, "--maximum_input_length")
    add_title(add)

    commands.add_parser("list", help="print id, number of tokens, and title or beginning of every context")

    search = commands.add_parser("search", help="retrieve contexts for a question (BM25)")
    search.add_argument("question", metavar="QUESTION", help="the query")
    search.add_argument(
        "--k", type=positive_int, default=5, metavar="CONTEXTS", help="contexts to show at most"
    )

    remove = commands.add_parser("remove", help="delete contexts and free their disk space")
    remove.add_argument("ids", metavar="ID", nargs="+", help="id of a context, as list prints it")

    commands.add_parser("verify", help="check every byte against its checksum")
    return parser
