"""Print versions, devices, extras, caches and free disk space for an issue report. Keys and tokens are not shown."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dssk import __version__
from dssk.utils.files import size
from dssk.utils.flags import Parser

PROGRAMS = ("git", "gcc", "torchrun", "deepspeed", "accelerate", "sbatch", "nvidia-smi", "chromium")
SHOWN_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "LANG", "LC_ALL"),
    *("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID", "NCCL_DEBUG", "PYTORCH_ALLOC_CONF"),
)
ADDRESSES = ("HF_ENDPOINT", "WANDB_BASE_URL")  # they may hold a password: only the host is shown
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # only whether they are set


def main(argv: Sequence[str] | None = None) -> None:
    build_parser().parse_args(argv)
    for title, lines in (
        ("versions", versions()),
        ("extras", extras()),
        ("devices", devices()),
        ("programs", programs()),
        ("environment", environment()),
        ("caches and free disk", disks()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")


def build_parser() -> Parser:
    return Parser(prog="dssk env", description=__doc__)


def versions() -> Iterator[str]:
    yield f"{'dssk':18}{__version__} in {Path(__file__).parents[1]}"
    yield f"{'python':18}{platform.python_version()} in {sys.prefix}"
    yield f"{'system':18}{platform.platform()}"
    for name, needed in requirements().items():
        if not needed:
            yield f"{name:18}{version(name) or 'missing'}"


def extras() -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for package, needed in requirements().items():
        for extra in needed:
            names.setdefault(extra, []).append(package)
    for extra, packages in sorted(names.items()):
        missing = [package for package in packages if version(package) is None]
        found = ", ".join(f"{package} {version(package)}" for package in packages if package not in missing)
        lacks = f'missing {", ".join(missing)}: pip install "dssk[{extra}]"' if missing else ""
        yield f"{extra:14}{'; '.join(filter(None, (found, lacks)))}"
    if not names:
        yield "unknown: dssk is not installed here, only found"


def requirements() -> dict[str, list[str]]:
    """Each package that dssk names, and the extras that want it; none for what is always needed."""
    found: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires("dssk") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        wanted = re.findall(r"extra == ['\"]([\w-]+)['\"]", line)
        found.setdefault(name, [])
        if wanted:
            found[name] += wanted
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"{'CPU':8}{len(os.sched_getaffinity(0))} cores of {os.cpu_count()}, {size(memory)} of memory"
    try:
        import torch
    except Exception as error:
        yield f"{'GPU':8}unknown, torch cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
        return
    if not torch.cuda.is_available():
        yield f"{'GPU':8}none (torch {torch.__version__}, built for CUDA {torch.version.cuda})"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"{f'GPU {index}':8}{card.name}, {size(card.total_memory)}, CUDA {torch.version.cuda}"


def programs() -> Iterator[str]:
    places = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    for name in PROGRAMS:
        yield f"{name:14}{shutil.which(name, path=places) or 'missing'}"


def environment() -> Iterator[str]:
    for name in SHOWN_VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]!r}"
    for name in ADDRESSES:
        if name in os.environ:
            yield f"{name}: host {urlsplit(os.environ[name]).hostname}"
    for name in SECRETS:
        yield f"{name}: {'set' if os.environ.get(name) else 'not set'}"


def disks() -> Iterator[str]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for name, folder in (
        ("here", Path.cwd()),
        ("Hub's cache", hub),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))
        there = "" if folder.exists() else ", not there yet"
        yield f"{name:14}{folder}{there}, {size(shutil.disk_usage(existing).free)} free"
