"""Publishing the model of a run on the Hugging Face Hub: preparing what is uploaded, and uploading it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dssk.checkpoint import load_manifest as load_checkpoint_manifest
from dssk.errors import Diverged, DsskError, EnvironmentFault
from dssk.hub.model_card import Origin, model_card
from dssk.inference.loading import find_model, load_model
from dssk.run_folder import read_metrics, scores_of
from dssk.store.opening import load_manifest
from dssk.utils.defaults import CROSS_ATTENTION, FUSED
from dssk.utils.files import atomic_folder, machine_faults, only_writer, require_free, size, temporary_folder
from dssk.utils.hub_names import hub_name

FILES = ["README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
FILES += ["tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"]
FILES += ["modeling_dssk.py"]  # what says, without dssk, what to install


def publish(
    checkpoint: str | Path,
    repository: str,
    what: str = FUSED,
    private: bool = True,
    base_model: str | None = None,
    data_path: str | Path | None = None,
) -> str:
    """Upload the model of `checkpoint`; returns the address of its page. See `prepare` for what is refused.

    Raises `EnvironmentFault` if the Hub cannot be reached or refuses.
    """
    check_repository(repository)
    parent = find_model(checkpoint).parent
    upload_folder = parent / "upload"
    with only_writer(upload_folder), temporary_folder(upload_folder) as folder:
        prepare(checkpoint, folder, repository, what, base_model, data_path)
        return upload(folder, repository, private)


def prepare(
    checkpoint: str | Path,
    folder: Path,
    repository: str,
    what: str = FUSED,
    base_model: str | None = None,
    data_path: str | Path | None = None,
) -> None:
    """Write the files to upload into `folder`.

    Args:
        base_model: the name of the base on the Hub; as the model was trained on, if not given.
        data_path: the store that it was trained on, for the model card.

    Raises `DamagedData` for a checkpoint that is not whole, `Diverged` for weights that are not finite, and
    `DsskError` for blocks alone whose base nobody else could load.
    """
    source = find_model(checkpoint)
    model, tokenizer = load_model(source)  # refuses a base, and verifies a checkpoint
    manifest = load_checkpoint_manifest(source)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise Diverged(f"{source}: {name} is not finite: publish an earlier checkpoint")
    base = base_model or model.config.base_model_name_or_path
    if what == CROSS_ATTENTION and not (base_model or hub_name(base)):
        raise DsskError(f"the base is {base}, nobody else has it: pass --base_model with its name on the Hub")
    model.config.base_model_name_or_path = base_model or hub_name(base)
    if base_model:
        model.config.base_model_revision = None
    require_free(folder, sum(p.nbytes for p in model.parameters()), "what is to be uploaded")
    with machine_faults(folder):
        model.save_pretrained(folder, cross_attn_only=what == CROSS_ATTENTION)
        tokenizer.save_pretrained(folder)
        card = model_card(repository, what, model, find_origin(checkpoint, manifest, base, data_path))
        card.save(folder / "README.md")


def find_origin(
    checkpoint: str | Path, manifest: dict[str, Any], base: str | None, data_path: str | Path | None
) -> Origin:
    """The origin of a checkpoint: from its manifest, and from the files of its run beside it."""
    folder = find_model(checkpoint)
    data: dict[str, Any] = {}
    if data_path:
        read = load_manifest(data_path)
        name = str(read.source["dataset"])
        data = {
            "data": Path(name).name if "dataset_contents" in read.source else name,
            "data_repository": None if "dataset_contents" in read.source else hub_name(name),
            "rows": read.counts.rows,
        }
    return Origin(
        base=hub_name(base) or Path(base or "the base").name,
        base_repository=hub_name(base),
        step=manifest.get("step"),
        experiment=manifest.get("experiment", {}),
        scores=scores_of(folder),
        metrics=_measured_at(folder.parent, manifest.get("step")),
        **data,
    )


def _measured_at(savedir: Path, step: int | None) -> dict[str, Any]:
    """Metrics of the evaluation at `step` during training."""
    rows = [row for row in read_metrics(savedir) if row["step"] == step and "eval_em" in row]
    return rows[-1] if rows else {}


def check_repository(repository: str) -> None:
    """Raise `DsskError` for a name that cannot be one, or if nobody is logged in. Asks nothing of the Hub."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise DsskError(
            f"the repository is {repository!r}, want USER/NAME: {str(error).splitlines()[0]}"
        ) from None
    if get_token() is None:
        raise DsskError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a prepared folder; returns the address of the model's page."""
    api = HfApi()
    try:
        page = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(page.repo_id).private:
            raise DsskError(
                f"{page.repo_id} exists and everyone can read it: pass --private false, or another name"
            )
        api.upload_folder(
            repo_id=page.repo_id, folder_path=folder, allow_patterns=FILES, commit_message="Upload the model"
        )
    except Exception as error:
        # The Hub's own errors are OSErrors, those of its transport of httpx or httpx2, by its version.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        reason = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
        raise EnvironmentFault(f"not uploaded to {repository}: {reason}; nothing here is lost") from error
    return str(page)


def write(
    checkpoint: str | Path,
    output: Path,
    repository: str | None = None,
    what: str = FUSED,
    base_model: str | None = None,
    data_path: str | Path | None = None,
) -> None:
    """The dry run: `output`, a new folder, appears when it is whole."""
    with only_writer(output):
        if output.exists():
            raise DsskError(f"--output {output} exists: want a new folder")
        with atomic_folder(output) as folder:
            prepare(checkpoint, folder, repository or output.name, what, base_model, data_path)
    print(f"{output}: {size(sum(file.stat().st_size for file in output.iterdir()))}, nothing was uploaded")
