"""Choose the layer whose states a base reads best, and map them to keys and values: no questions, no training.

    dssk calibrate --base smollm2 --text squad.jsonl.gz notes.txt --encode_layer auto --output calibrated

writes the base with its merged reader, ready to be asked, evaluated or published; calibration.json, with the score of
each layer that was tried; and layers.png, the curve. Texts are files of paragraphs (.txt, blank lines between them) or
rows with a "context" (JSONL, CSV, Parquet, ...); some are held out to score the layers.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dssk.errors import DsskError
from dssk.utils.defaults import STORAGE_DTYPES
from dssk.utils.flags import Parser, optional_str, positive_int

if TYPE_CHECKING:
    from dssk.inference.calibrate import Layers, LayerScore, Scan

AUTO = "auto"
REPORT, CURVE = "calibration.json", "layers.png"  # written beside the model


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.utils.files import only_writer

    with only_writer(args.output):
        calibrate(args)


def calibrate(args: argparse.Namespace) -> None:
    """Run `dssk calibrate`."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise DsskError(f"{args.output} is not empty: name a folder that does not exist yet with --output")
    from dssk.checkpoint import finish_checkpoint
    from dssk.inference.calibrate import calibrated, divided, first_tokens, scan
    from dssk.inference.loading import device, load_base, load_base_config
    from dssk.inference.rounding import TORCH_DTYPES
    from dssk.inference.tokenizer import load_tokenizer, tokenize_contexts
    from dssk.models.shapes import window
    from dssk.utils.console import quiet_libraries
    from dssk.utils.files import atomic_folder

    quiet_libraries()
    tokenizer = load_tokenizer(args.base, args.revision)
    texts = tokenize_contexts(tokenizer, list(read_texts(args.text)))
    longest = min(args.text_tokens, window(load_base_config(args.base, args.revision)))
    fitted, held_out = divided([ids[:longest] for ids in texts], args.held_out)
    dtype = args.dtype if args.dtype == AUTO else TORCH_DTYPES[args.dtype]
    base = load_base(args.base, args.revision, dtype=dtype, device=device())
    candidates = to_candidates(args.encode_layer, base.config.get_text_config().num_hidden_layers)
    found = scan(
        base,
        first_tokens(fitted, args.tokens),
        held_out,
        candidates,
        args.storage_dtype,
        args.rank,
        report=say,
    )
    del base
    # Saved in the base's own type, whatever was computed in: stores of that base suit it.
    model = calibrated(found, args.base, revision=args.revision, dtype=AUTO)
    with atomic_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_report(found, args.storage_dtype, folder)
        finish_checkpoint(folder, {"fused": True})
    print(summary(found, args.output))


def write_report(found: "Scan", storage_dtype: str, folder: Path) -> None:
    """The score of each layer, as JSON and as a curve."""
    from dssk.report.figures import layer_curve, write_png
    from dssk.utils.files import write_json

    write_json(folder / REPORT, {**found.to_dict(), "storage_dtype": storage_dtype})
    single = [(score.layers[0], score.nll) for score in found.scores if len(score.layers) == 1]
    if len(single) > 1:
        curve = layer_curve(single, found.best.layers[0], found.prompted_nll, found.unread_nll)
        write_png(curve, folder / CURVE)


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The distinct texts of some files, in order. Raises `DsskError` for a file without any."""
    from dssk.data.readers import BadRow, is_data, read_rows

    seen: set[str] = set()
    for path in paths:
        if not path.is_file():
            raise DsskError(f"--text {path}: no such file")
        if is_data(path.name):
            rows: Iterator[Any] = (row.value for row in read_rows([str(path)]))
            found: Iterator[str] = (
                row["context"] for row in rows if not isinstance(row, BadRow) and _has_context(row)
            )
        else:
            found = _paragraphs(path)
        before = len(seen)
        for text in found:
            if text.strip() and text not in seen:
                seen.add(text)
                yield text
        if len(seen) == before:
            raise DsskError(
                f'--text {path}: found no new text, want rows with "context", or paragraphs in a .txt file'
            )


def _has_context(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("context"), str)


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DsskError(f"--text {path}: not UTF-8 text, and no kind of table that can be read") from error
    yield from (paragraph.strip() for paragraph in text.split("\n\n"))


def to_candidates(encode_layer: str, num_layers: int) -> "list[Layers]":
    """The layers to try: all of them for `auto`, else the one or two that are named."""
    from dssk.models.layers import named_layers

    if encode_layer == AUTO:
        return [(layer,) for layer in range(1, num_layers + 1)]
    if encode_layer.count("+") > 1:
        raise DsskError(f"--encode_layer {encode_layer}: want {AUTO}, one layer, or two, 10+18")
    try:
        return [named_layers(encode_layer, num_layers)]
    except ValueError as error:
        raise DsskError(f"--encode_layer {encode_layer}: {error}") from error


def say(score: "LayerScore") -> None:
    """One line a layer, as soon as it is known."""
    layers = " and ".join(map(str, score.layers))
    print(
        f"layer {layers}: NLL {score.nll:.3f}, explains {score.explained:.1%} of keys and values", flush=True
    )


def summary(found: "Scan", output: Path) -> str:
    """The result, in one paragraph."""
    layers = " and ".join(map(str, found.best.layers))
    read, prompted = (found.unread_nll - nll for nll in (found.best.nll, found.prompted_nll))
    gained = f"{read / prompted:.0%} of the way" if prompted > 0 else "this base makes nothing of a context"
    return (
        f"wrote {output}: reads the states of layer {layers}. Held-out text has {found.best.nll:.3f} nats a token read "
        f"from them, {found.prompted_nll:.3f} in the prompt and {found.unread_nll:.3f} unread: {gained}."
    )


def build_parser() -> Parser:
    parser = Parser(prog="dssk calibrate", description=__doc__)
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="base model: a folder, or a name on the Hub")
    add("--revision", type=optional_str, metavar="REVISION", help="branch, tag or commit on the Hub")
    add(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="texts to fit the maps on; they need no labels",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the calibrated model")
    add(
        "--encode_layer",
        default=AUTO,
        metavar="LAYER",
        help="layer whose input is stored: auto (try all), last, a number, a share of the depth, or two layers, 10+18",
    )
    add(
        "--tokens", type=positive_int, default=20_000, metavar="TOKENS", help="most tokens to fit the maps on"
    )
    add("--text_tokens", type=positive_int, default=512, metavar="TOKENS", help="most tokens of a text")
    add("--held_out", type=positive_int, default=16, metavar="TEXTS", help="most texts to score layers on")
    add(
        "--rank",
        type=positive_int,
        metavar="RANK",
        help="rank of the matrix of all maps together (default: full)",
    )
    add("--storage_dtype", choices=STORAGE_DTYPES, default="bf16", help="type that states will be stored in")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="type to compute in")
    return parser
