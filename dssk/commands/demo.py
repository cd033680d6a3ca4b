"""Serve a page to try a model on, and print its address.

Paste a context, encode it and ask questions. The page shows the answer, the attention on the tokens of the context, and
the latency beside that of prompting the same base with the context. It needs gradio (`dssk[demo]`).
"""

from collections.abc import Sequence

from dssk.utils.defaults import PORT
from dssk.utils.flags import Parser, add_checkpoint, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.demo.page import serve
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    serve(args.checkpoint, args.host, args.port)


def build_parser() -> Parser:
    parser = Parser(prog="dssk demo", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0: all networks"
    )
    parser.add_argument("--port", type=positive_int, default=PORT, metavar="PORT", help="1 to 65535")
    return parser
