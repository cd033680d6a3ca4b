"""Write the fused model of a checkpoint, base and blocks in one; or, with --base, the plain base in it.

A fused model loads with `AutoModelForCausalLM.from_pretrained` after `import dssk`. Base weights are those of the base,
bit for bit; a run with fp16 or bf16 has them, and what was trained, rounded to that type.
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
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="C", help="a checkpoint, or the folder of a run")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder, or an earlier export to replace",
    )
    add("--base", action="store_true", help="write the plain base model in place of the fused one")
    add(
        "--base_model",
        type=optional_str,
        metavar="MODEL",
        help="where the base is now (default: where it was at training)",
    )
    return parser
