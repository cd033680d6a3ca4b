"""Describing a store of encoded contexts: a summary, and a histogram of lengths."""

from collections.abc import Mapping
from pathlib import Path

from dssk.store.manifest import HISTOGRAM_BIN_TOKENS, LAST_LAYER, Counts, Manifest
from dssk.utils import files


def summary(manifest: Manifest) -> dict[str, str]:
    """A description of a store, by topic."""
    revision = f" at {manifest.model_revision}" if manifest.model_revision else ""
    layer = "" if manifest.encode_layer == LAST_LAYER else f", layer {manifest.encode_layer}"
    topics = {"model": f"{manifest.model_id}{revision}, computed in {manifest.model_dtype}{layer}"}
    if manifest.is_library:
        topics["contexts"] = str(sum(segment.rows for segment in manifest.segments))
    else:
        topics |= _data_set(manifest)
    topics["encodings"] = "none: texts only"
    if manifest.storage_dtype is not None:
        num_bytes = sum(segment.num_bytes for segment in manifest.segments)
        shape = f"{manifest.storage_dtype} x {manifest.hidden_size}"
        topics["encodings"] = f"{files.size(num_bytes)} in {len(manifest.segments)} segments, {shape}"
    return topics


def _data_set(manifest: Manifest) -> dict[str, str]:
    counts = manifest.counts
    source = ", ".join(f"{name} {value}" for name, value in manifest.source.items() if value is not None)
    return {
        "rows": _listed(counts.rows),
        "source": source,
        "read": f"{counts.read} rows; dropped: {_listed(counts.dropped)}; malformed: {len(counts.bad_rows)}",
        "contexts": f"{counts.contexts}, of {counts.tokens} tokens together",
        "lengths": f"about {_quantile(counts, 0.5)} (median), {_quantile(counts, 0.95)} (95 %), "
        f"{_quantile(counts, 1.0)} (longest) tokens",
        "truncated": f"{counts.truncated} to {manifest.maximum_input_length} tokens",
    }


def _listed(numbers: Mapping[str, int]) -> str:
    """`"train: 12, val: 3"`."""
    return ", ".join(f"{name}: {number}" for name, number in numbers.items()) or "none"


def _quantile(counts: Counts, share: float) -> int:
    """The tokens that `share` of the contexts do not exceed, up to the width of a bin."""
    below = 0
    for index, number in enumerate(counts.length_histogram):
        below += number
        if below >= share * counts.contexts:
            return (index + 1) * HISTOGRAM_BIN_TOKENS
    return 0


def plot_lengths(manifest: Manifest, path: Path) -> None:
    """Draw how many contexts have how many tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    histogram = manifest.counts.length_histogram
    axes.stairs(histogram, [i * HISTOGRAM_BIN_TOKENS for i in range(len(histogram) + 1)], fill=True)
    axes.set_xlabel("tokens")
    axes.set_ylabel("contexts")
    axes.set_title(f"{manifest.counts.contexts} contexts, {manifest.counts.tokens} tokens")
    files.make_folder(path.parent)
    with files.machine_faults(path):
        figure.savefig(path, dpi=150)
