"""Write contexts as an ordinary KV cache, for inference engines that do not know dssk.

    dssk restore --checkpoint C --library DIR --context_id amber --output cache.safetensors
    dssk restore --checkpoint C --context notes.txt --output cache.safetensors --dtype bf16

Only models with `reader: merged` have such a cache. docs/readers.md shows how plain transformers continues from it.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dssk.errors import DsskError
from dssk.utils.flags import Parser, add_checkpoint

if TYPE_CHECKING:
    import torch

AUTO = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if bool(args.library) != bool(args.context_id):
        raise DsskError("--library and --context_id go together: one says where the contexts are, one which")
    import torch

    from dssk.inference.batching import pad_states
    from dssk.inference.loading import device, load_model
    from dssk.inference.restore import save_cache
    from dssk.inference.rounding import TORCH_DTYPES
    from dssk.models.merged import MergedContext
    from dssk.utils.console import quiet_libraries
    from dssk.utils.files import size

    quiet_libraries()
    model, tokenizer = load_model(args.checkpoint, device=device())
    states, mask = pad_states([s.to(model.device) for s in find_states(args, model, tokenizer)])
    with torch.no_grad():
        context = model.project_context(states, mask)
    if not isinstance(context, MergedContext):
        raise DsskError(f"{args.checkpoint} reads with blocks of its own: want a model with reader: merged")
    dtype = None if args.dtype == AUTO else TORCH_DTYPES[args.dtype]
    save_cache(context, args.output, dtype, base=str(model.config.base_model_name_or_path or args.checkpoint))
    tokens = int(context.lengths.sum())
    print(
        f"wrote {args.output}: {len(context)} contexts of {tokens} tokens, {size(args.output.stat().st_size)}"
    )
    if model.config.decoder_lora:
        acted = ", which acted in the layers that were run again" if model.config.reader_replay else ""
        print(f"a plain engine answers without the adapters of {args.checkpoint} (decoder_lora){acted}")


def find_states(args: Namespace, model: Any, tokenizer: Any) -> "list[torch.Tensor]":
    """The states (S, d) of each context: from the library, or of texts that are encoded now."""
    if args.library:
        from dssk.store.library import ContextLibrary

        library = ContextLibrary(args.library)
        library.check_model(args.checkpoint)
        return [library.get(id).encoder_hidden_states for id in args.context_id]
    from dssk.demo.asking import read_text
    from dssk.inference.encoding import Encoder
    from dssk.inference.tokenizer import tokenize_contexts
    from dssk.models.shapes import window

    texts = [read_text(path) for path in args.context]
    tokens, positions = tokenize_contexts(tokenizer, texts), window(model.config)
    for path, ids in zip(args.context, tokens, strict=True):
        if len(ids) >= positions:
            raise DsskError(
                f"--context {path} has {len(ids):,} tokens, of the model's {positions:,} positions none is left to a "
                "text: divide it, or take passages of a library"
            )
    return Encoder(model, tokenizer, maximum_input_length=positions).encode(texts, input_ids=tokens)


def build_parser() -> Parser:
    parser = Parser(prog="dssk restore", description=__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--library", metavar="DIR", help="a library of contexts, or a store")
    source.add_argument(
        "--context", metavar="FILE", action="append", help="a text (UTF-8, - for standard input); repeatable"
    )
    add("--context_id", metavar="ID", action="append", help="a context of the library; repeatable")
    add("--output", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    add(
        "--dtype",
        choices=(AUTO, "fp32", "bf16", "fp16"),
        default=AUTO,
        help="type of keys and values; auto: the model's",
    )
    return parser
