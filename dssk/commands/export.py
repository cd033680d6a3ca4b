"""Write the fused model of a checkpoint, base and blocks in one; or, with --base, the plain base in it.

A fused model loads with `AutoModelForCausalLM.from_pretrained` after `import dssk`. Base weights are those of the base,
bit for bit and in its precision.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser, optional_str


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.hub.export import export
    from dssk.utils.console import quiet_libraries
    from dssk.utils.files import size

    quiet_libraries()
    num_bytes = export(args.checkpoint, args.output, args.base_model, args.base)
    print(f"{args.output}: the {'base' if args.base else 'fused model'}, {size(num_bytes)}")


def build_parser() -> Parser:
    parser = Parser(prog="dssk export", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="C",
        help="checkpoint, or the folder of a run (its newest)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; it must not exist or be an export",
    )
    parser.add_argument(
        "--base",
        action="store_true",
        help="write the plain base model in place of the fused one (default: fused)",
    )
    parser.add_argument("--base_model", type=optional_str, help="where the base is, if it has moved")
    return parser
