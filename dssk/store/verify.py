"""Checking that a store is what was written, byte for byte."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from dssk.errors import DamagedData, DsskError
from dssk.store import format as store
from dssk.utils import files

_SHOWN = 5


def check(folder: str | Path, rank: int = 0, size: int = 1) -> store.Manifest:
    """Read all of a store; raises `DamagedData` naming what is damaged. Meant for before the first step of training.

    `size` processes can share the work: each takes every `size`-th file, from number `rank` on.
    """
    folder = Path(folder)
    manifest = store.load_manifest(folder)
    ours = sorted(manifest.files)[rank::size]
    damaged = damaged_files(folder, {name: manifest.files[name] for name in ours})
    if damaged:
        shown = ", ".join(f"{name} {fault}" for name, fault in list(damaged.items())[:_SHOWN])
        more = ", ..." if len(damaged) > _SHOWN else ""
        raise DamagedData(
            f"{len(damaged)} of {len(manifest.files)} files in {folder} are damaged: {shown}{more}: "
            f"{store.repair(folder)}"
        )
    return manifest


def damaged_files(folder: Path, infos: dict[str, store.FileInfo]) -> dict[str, str]:
    """The files, of those in `infos`, that are not as written: name -> what is wrong."""
    total = sum(info.num_bytes for info in infos.values())
    bar = tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(lambda name: _fault(folder / name, infos[name], bar), infos)
        return {name: fault for name, fault in zip(infos, faults, strict=True) if fault}


def _fault(path: Path, info: store.FileInfo, bar: tqdm) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != info.num_bytes:
            return f"has {num_bytes} bytes, not {info.num_bytes}"
        return "" if files.xxh3_128(path, bar.update) == info.xxh3_128 else "was altered"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def discard(folder: Path) -> None:
    """Delete the damaged files and the manifest of a store; the preprocessing command then makes them again."""
    if not folder.is_dir():
        raise DsskError(f"no such folder: {folder}")
    with store.lock(folder):
        try:
            infos = store.load_manifest(folder).files
        except DsskError:
            infos = _infos_of_shards(folder)
        damaged = damaged_files(folder, infos)
        # the manifest goes first: a folder without one is unfinished, whatever else it lacks
        for path in (folder / store.MANIFEST, *(folder / name for name in damaged)):
            files.remove(path)
    print(f"Discarded {len(damaged)} damaged files: start the preprocessing command again to make them anew.")


def _infos_of_shards(folder: Path) -> dict[str, store.FileInfo]:
    """What the shards' own manifests say, for a store whose manifest is lost."""
    infos = {}
    for path in sorted((folder / store.CONTEXTS).glob("data-*.arrow")):
        shard = store.load_shard_info(path.with_suffix(".json"))
        name = path.relative_to(folder).as_posix()
        infos[name] = store.FileInfo(
            num_bytes=shard.num_bytes if shard else 0, xxh3_128=shard.xxh3_128 if shard else ""
        )
    return infos
