"""Answer questions about one text: `python -m dssk.evaluation.answer --checkpoint C --context FILE --question "..."`.

The text is encoded once, whatever the number of questions.
"""

import sys
from pathlib import Path

import torch

from dssk import prompts
from dssk.checkpoint import load_model
from dssk.console import quiet_libraries
from dssk.errors import DsskError, run
from dssk.evaluation.generate import MAX_NEW_TOKENS, generate_answers
from dssk.flags import Parser, positive_int


def main() -> None:
    parser = Parser(prog="python -m dssk.evaluation.answer", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, fused model, or a run's folder")
    parser.add_argument(
        "--context", required=True, help="text file (UTF-8) to answer from; - for standard input"
    )
    parser.add_argument("--question", required=True, action="append", help="may be given several times")
    parser.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=MAX_NEW_TOKENS,
        help="longest answer, in tokens (%(default)s)",
    )
    args = parser.parse_args()
    quiet_libraries()

    text = read_text(args.context)
    model, tokenizer = load_model(args.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokenizer(prompts.context(text), add_special_tokens=False, return_tensors="pt")["input_ids"]
    longest = model.config.max_position_embeddings
    if tokens.shape[1] > longest:
        print(
            f"dssk: the context has {tokens.shape[1]} tokens, the first {longest} are read", file=sys.stderr
        )
    states, _ = model.encode(tokens[:, :longest].to(model.device))
    answers = generate_answers(
        model, tokenizer, args.question, lambda _: states[0], len(args.question), args.max_new_tokens
    )
    print("\n".join(answers))


def read_text(path: str) -> str:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DsskError(f"cannot read the context {path}: {error}") from error
    if not text.strip():
        raise DsskError(f"the context {path} is empty")
    return text.strip()


if __name__ == "__main__":
    sys.exit(run(main))
