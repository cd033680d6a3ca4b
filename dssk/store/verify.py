"""Check that a store is what was written, byte for byte; take what is damaged out of one that can be made again."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from dssk.errors import DamagedData, DsskError
from dssk.store.manifest import CONTEXTS, MANIFEST, SPLITS, FileInfo, Manifest, load_shard_info
from dssk.store.opening import find_fault, load_manifest, repair
from dssk.utils import files, hashes

_SHOWN = 5


def check(folder: str | Path, rank: int = 0, size: int = 1, anew: bool = False) -> Manifest:
    """Read all of a store; raises `DamagedData` naming what is damaged. Meant for before the first step of training.

    A file that was read before and is the same since is not read again, but with `anew`. `size` processes can share
    the work: each takes every `size`-th file, from number `rank` on.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    infos = manifest.all_files
    ours = {name: infos[name] for name in sorted(infos)[rank::size]}
    damaged = damaged_files(folder, ours, files.xxh3_128 if anew else hashes.xxh3_128)
    if damaged:
        shown = ", ".join(f"{name} {fault}" for name, fault in list(damaged.items())[:_SHOWN])
        more = ", ..." if len(damaged) > _SHOWN else ""
        raise DamagedData(
            f"{len(damaged)} of {len(infos)} files in {folder} are damaged: {shown}{more}: {repair(folder)}"
        )
    return manifest


def damaged_files(
    folder: Path, infos: dict[str, FileInfo], checksum: Callable[..., str] = files.xxh3_128
) -> dict[str, str]:
    """The files, of those in `infos`, that are not as written: name -> what is wrong."""
    total = sum(info.num_bytes for info in infos.values())
    paths = {name: files.inside(folder, name) for name in infos}
    bar = tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(lambda name: find_fault(paths[name], infos[name], bar.update, checksum), infos)
        return {name: fault for name, fault in zip(infos, faults, strict=True) if fault}


def discard(folder: Path) -> list[str]:
    """Delete the damaged files and the manifest of a store; the preprocessing command then makes them again.

    Returns their names. A library is refused: there is nothing to make its contexts from.
    """
    if not folder.is_dir():
        raise DsskError(f"no such folder: {folder}")
    if not any((folder / split).is_dir() for split in SPLITS):
        raise DsskError(
            f"{folder} is no data set's store, so nothing in it can be made again: {repair(folder)}"
        )
    with files.only_writer(folder):
        try:
            infos = load_manifest(folder).all_files
        except DsskError:
            infos = _infos_of_shards(folder)
        damaged = damaged_files(folder, infos)
        # the manifest goes first: a folder without one is unfinished, whatever else it lacks
        for path in (folder / MANIFEST, *(files.inside(folder, name) for name in damaged)):
            files.remove(path)
    return list(damaged)


def _infos_of_shards(folder: Path) -> dict[str, FileInfo]:
    """Sizes and checksums from the shards' own manifests, for a store whose manifest is lost."""
    infos = {}
    for path in sorted((folder / CONTEXTS).glob("data-*.arrow")):
        shard = load_shard_info(path.with_suffix(".json"))
        infos[f"{CONTEXTS}/{path.name}"] = FileInfo(
            num_bytes=shard.num_bytes if shard else 0, xxh3_128=shard.xxh3_128 if shard else "0" * 32
        )
    return infos
