"""A page to try a model on: run this, then open the address that it prints.

Paste a context and encode it, then ask: the page shows the answer, which tokens of the context it was found by, and
the seconds that it took beside those of prompting the same base with the context. It needs gradio (`dssk[demo]`).
"""

from collections.abc import Sequence

from dssk.utils.defaults import PORT
from dssk.utils.flags import Parser, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.demo.page import serve
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    serve(args.checkpoint, args.host, args.port)


def build_parser() -> Parser:
    parser = Parser(prog="dssk demo", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="checkpoint, fused model, or a run's folder"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s, only this one)",
    )
    parser.add_argument("--port", type=positive_int, default=PORT, metavar="PORT", help="1 to 65535")
    return parser
