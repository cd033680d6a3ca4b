"""Write the fused model of a checkpoint, base and blocks in one: `python -m dssk.export --help`.

It loads with `AutoModelForCausalLM.from_pretrained` after `import dssk`. Base weights are those of the base, bit for
bit and in its precision.
"""

import sys
from pathlib import Path

from dssk.checkpoint import load_manifest, write_checkpoint
from dssk.errors import DsskError, run
from dssk.inference.loading import find_model, load_model
from dssk.utils.console import quiet_libraries
from dssk.utils.files import size
from dssk.utils.flags import Parser, optional_str


def export(checkpoint: Path, output: Path, base_model: str | None = None) -> int:
    """Write the fused model of `checkpoint` to the folder `output`; returns its bytes."""
    model, tokenizer = load_model(checkpoint, base_model=base_model)
    facts = {"fused": True} | _origin(find_model(checkpoint))
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_checkpoint(output, facts, num_bytes):
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return sum(entry["num_bytes"] for entry in load_manifest(output)["files"].values())


def _is_export(folder: Path) -> bool:
    try:
        return bool(load_manifest(folder).get("fused"))
    except DsskError:
        return False


def _origin(folder: Path) -> dict:
    try:
        manifest = load_manifest(folder)
    except DsskError:  # a fused model of other origin
        return {}
    return {key: manifest[key] for key in ("step", "experiment") if key in manifest}


def main() -> None:
    parser = Parser(prog="python -m dssk.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, or the folder of a run (its newest)")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist or be an export")
    parser.add_argument("--base_model", type=optional_str, help="where the base is, if it has moved")
    args = parser.parse_args()
    quiet_libraries()
    output = Path(args.output)
    if output.exists() and not _is_export(output):
        raise DsskError(f"--output {output} exists and is no export: want a new folder")
    num_bytes = export(Path(args.checkpoint), output, args.base_model)
    print(f"{output}: the fused model, {size(num_bytes)}")


if __name__ == "__main__":
    sys.exit(run(main))
