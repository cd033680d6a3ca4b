"""Compare cached contexts with the alternatives on the same base: prompting and fine-tuning.

Systems: the fused model, by the name of its reader (`cross_attention` or `merged`); its base with the context in the
prompt (`prompted`) and with the context's KV cache read from disk (`prompted_prefix_cache`); the base fine-tuned on
such prompts with LoRA (`lora_prompted`) or in full (`full_prompted`). `prompted_examples` (two-shot prompts) is
compared if it is named.
The fused model is also scored under controls, and two heuristics need no model. With --num_contexts, prompts hold the
contexts in order and shuffled; if the base's window is too short for all, they hold the question's own and as many
others as fit. Finished results are kept: the same command continues where it was stopped.
"""

from collections.abc import Sequence

from dssk.utils.defaults import RATE_FACTORS, SYSTEMS
from dssk.utils.flags import (
    Parser,
    add_checkpoint,
    add_generation,
    add_scoring,
    bool_flag,
    minutes,
    positive_int,
    seed,
)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.research.compare import Comparison, compare_and_show
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    compare_and_show(Comparison(**vars(args)))


def build_parser() -> Parser:
    parser = Parser(prog="dssk compare", description=__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--data_path", required=True, metavar="DIR", help="store to train on (train) and to score on (val)")
    add("--output", default="runs/compare", metavar="DIR", help="folder to write")
    add(
        "--systems",
        metavar="NAME,...",
        help=f"systems to compare (default: the checkpoint's reader,{','.join(SYSTEMS)})",
    )
    add(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=STORE_OR_FILE",
        help="a further set of questions to score on; repeatable",
    )
    add_scoring(parser)
    add_generation(parser, "--eval_batch_size")
    training = parser.add_argument_group("fine-tuning of lora_prompted and full_prompted")
    add = training.add_argument
    add("--steps", type=positive_int, metavar="STEPS", help="optimizer steps (default: the checkpoint's)")
    add(
        "--minutes",
        type=minutes,
        metavar="CPU_MINUTES",
        help="end after this CPU time in place of --steps; the learning rate is scheduled over it",
    )
    add(
        "--batch_size",
        type=positive_int,
        metavar="PROMPTS",
        help="prompts of each step (default: as many rows as the checkpoint's)",
    )
    add(
        "--learning_rate",
        type=float,
        metavar="RATE",
        help=f"peak learning rate (default: {RATE_FACTORS['lora']:g} times the checkpoint's for LoRA, "
        f"{RATE_FACTORS['full']:g} times for all weights)",
    )
    add("--lora_rank", type=positive_int, default=16, metavar="RANK", help="rank of LoRA's matrices")
    add("--seed", type=seed, default=0, metavar="SEED", help="of the order of rows")
    parser.add_argument(
        "--medium_cost",
        type=bool_flag,
        default=True,
        metavar="BOOL",
        help="also time a random model of 124 million parameters on contexts of 1500 tokens, unless cost.json "
        "exists; takes one or two minutes on a CPU",
    )
    return parser
