"""Publish the model of a run on the Hugging Face Hub.

    dssk publish --checkpoint RUN --output DIR        # writes what would be uploaded, and uploads nothing
    dssk publish --checkpoint RUN --repo USER/NAME

`fused` is the whole model; `cross_attention` is the trained blocks alone (megabytes) with the base's name on the Hub.
Both load with `AutoModelForCausalLM.from_pretrained` after `import dssk`. Log in with `hf auth login` or HF_TOKEN.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.errors import DsskError
from dssk.utils.defaults import CROSS_ATTENTION, FUSED
from dssk.utils.flags import Parser, add_checkpoint, bool_flag, optional_str


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if not (args.output or args.repo):
        raise DsskError("want --repo USER/NAME to upload to, or --output DIR to look at it before")
    from dssk.hub.publish import publish, write
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    if args.output:
        write(args.checkpoint, args.output, args.repo, args.what, args.base_model, args.data_path)
    else:
        print(publish(args.checkpoint, args.repo, args.what, args.private, args.base_model, args.data_path))


def build_parser() -> Parser:
    parser = Parser(prog="dssk publish", description=__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--repo", metavar="USER/NAME", help="repository on the Hub")
    add(
        "--what",
        choices=(FUSED, CROSS_ATTENTION),
        default=FUSED,
        help="the fused model, or the trained blocks",
    )
    add(
        "--private",
        type=bool_flag,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="false: everyone can download it",
    )
    add("--output", type=Path, metavar="DIR", help="dry run: write what would be uploaded to this new folder")
    add(
        "--base_model",
        type=optional_str,
        metavar="USER/NAME",
        help="name of the base on the Hub (default: where it was loaded from)",
    )
    add(
        "--data_path",
        type=optional_str,
        metavar="DIR",
        help="store of the training data, to be described on the model card",
    )
    return parser
