"""Publish the model of a run on the Hugging Face Hub.

    dssk publish --checkpoint RUN --output DIR        # writes what would be uploaded, and uploads nothing
    dssk publish --checkpoint RUN --repo USER/NAME

`fused` is the whole model, `cross_attention` the trained blocks alone, megabytes, which name the base on the Hub. Both
load with `AutoModelForCausalLM.from_pretrained` after `import dssk`. The login is that of `hf auth login` or HF_TOKEN.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.errors import DsskError
from dssk.utils.defaults import CROSS_ATTENTION, FUSED
from dssk.utils.flags import Parser, bool_flag, optional_str


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
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="C",
        help="a run's folder, or a checkpoint or fused model in it",
    )
    parser.add_argument("--repo", metavar="USER/NAME", help="repository on the Hub")
    parser.add_argument("--what", choices=(FUSED, CROSS_ATTENTION), default=FUSED, help="of the model")
    parser.add_argument(
        "--private",
        type=bool_flag,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="false: everyone can read it",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="new folder for what would be uploaded; nothing is"
    )
    parser.add_argument(
        "--base_model", type=optional_str, help="the base's name on the Hub, if it was not loaded from there"
    )
    parser.add_argument(
        "--data_path",
        type=optional_str,
        metavar="DIR",
        help="folder of the training data, for the model card",
    )
    return parser
