"""Conversion of manifests of version 0.1: of stores (`manifest.json`) and of libraries (`library.json`)."""

from typing import Any

from dssk.store.manifest import CONTEXTS, Manifest, shard_name

LIBRARY = "library.json"
FORMAT_VERSION = 1


def convert_store(body: dict[str, Any]) -> Manifest:
    """The manifest of a store; its tables of contexts have no ids, titles and `truncated`."""
    body = {name: value for name, value in body.items() if name not in ("format_version", "checksum")}
    infos, shards = body.pop("files"), body.pop("shards")
    segments = []
    for index, shard in enumerate(shards):
        name = f"{CONTEXTS}/{shard_name(index, len(shards))}.arrow"
        segments.append({"name": name, "rows": shard["rows"], **infos.pop(name)})
    data_set = {name: body.pop(name) for name in ("shard_rows", "source", "counts")}
    return Manifest.model_validate({**body, "segments": segments, "files": infos, "data_set": data_set})


def convert_library(body: dict[str, Any]) -> Manifest:
    """The manifest of a library; its segments lie beside it, and their column `number` gives the order of rows."""
    body = {name: value for name, value in body.items() if name != "format_version"}
    return Manifest.model_validate({"files": {}, **body})
