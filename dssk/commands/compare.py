"""Compare cached contexts with what one would do without them, on one base.

Systems: the fused model (`cross_attention`); its base with the context in the prompt (`prompted`) and with the
context's KV cache read from disk (`prompted_prefix_cache`); the base fine-tuned on such prompts with LoRA
(`lora_prompted`) or whole (`full_prompted`); `prompted_examples`, if named, has two worked examples before its prompt.
Controls and two heuristics stand beside them, and with --num_contexts questions that read several contexts at a time.
What is finished is kept: the same command goes on where it was stopped.
"""

from collections.abc import Sequence

from dssk.utils.defaults import BATCH_SIZE, CONTROLS, MAX_NEW_TOKENS, RATE_FACTORS, SYSTEMS
from dssk.utils.flags import Parser, bool_flag, minutes, positive_int


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.research.compare import Comparison, compare_and_show
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    compare_and_show(Comparison(**vars(args)))


def build_parser() -> Parser:
    parser = Parser(prog="dssk compare", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="checkpoint, fused model, or a run's folder"
    )
    parser.add_argument(
        "--data_path", required=True, metavar="DIR", help="store: trains on its train split, scores on val"
    )
    parser.add_argument("--output", default="runs/compare", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--systems", default=",".join(SYSTEMS), help="with commas between; default: all, %(default)s"
    )
    parser.add_argument(
        "--controls",
        default=",".join(CONTROLS),
        help="of the fused model, with commas between; default: all, %(default)s",
    )
    parser.add_argument(
        "--num_contexts",
        metavar="N,N,...",
        help="also score cross_attention, prompted and prompted_examples with so many contexts at a time, the right "
        "one among others and missing; prompts hold them in order and shuffled, and where the base's window has no "
        "room for all, the right one and as many others as fit (none)",
    )
    parser.add_argument(
        "--distractors",
        default="random",
        metavar="SOURCE,...",
        help="where the others come from: document, neighbours (by the question's words), random (%(default)s)",
    )
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=STORE_OR_FILE",
        help="score on these questions as well; may be given several times",
    )
    parser.add_argument(
        "--max_questions",
        type=positive_int,
        metavar="QUESTIONS",
        help="score this many of each set, spread over it (all)",
    )
    parser.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=BATCH_SIZE,
        metavar="QUESTIONS",
        help="answered at a time, fewer where contexts are long",
    )
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=MAX_NEW_TOKENS, metavar="TOKENS", help="longest answer"
    )
    training = parser.add_argument_group("fine-tuning of lora_prompted and full_prompted")
    training.add_argument(
        "--steps", type=positive_int, metavar="STEPS", help="optimizer steps (as many as the checkpoint's)"
    )
    training.add_argument(
        "--minutes",
        type=minutes,
        metavar="CPU_MINUTES",
        help="end it after so many, in place of --steps; the learning rate has come down by then",
    )
    training.add_argument(
        "--batch_size", type=positive_int, metavar="PROMPTS", help="in a step (as the checkpoint's)"
    )
    training.add_argument(
        "--learning_rate",
        type=float,
        metavar="RATE",
        help=f"at its peak (LoRA {RATE_FACTORS['lora']:g}, whole {RATE_FACTORS['full']:g} times the checkpoint's)",
    )
    training.add_argument(
        "--lora_rank", type=positive_int, default=16, metavar="RANK", help="of LoRA's matrices"
    )
    training.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the order of rows")
    parser.add_argument(
        "--medium_cost",
        type=bool_flag,
        default=True,
        metavar="BOOL",
        help="also measure a random model of 124 million parameters at contexts of 1500 tokens, a minute or two "
        "on a CPU, unless cost.json is there",
    )
    return parser
