"""Names of before: they are in the other modules of this room now."""

from dssk.inference.rounding import TORCH_DTYPES, StorageDtype, dequantize  # noqa: F401
from dssk.store.dataset import (  # noqa: F401
    QUESTION_FEATURES,
    FetchStates,
    finish,
    load_rows,
    write_dataset_files,
)
from dssk.store.manifest import (  # noqa: F401
    CONTEXTS,
    HISTOGRAM_BIN_TOKENS,
    MANIFEST,
    SPLITS,
    Checked,
    Counts,
    Encoding,
    FileInfo,
    Manifest,
    Settings,
    ShardInfo,
    Strict,
    load_shard_info,
    lock,
    shard_name,
)
from dssk.store.opening import check_model, check_sizes, find_fault, load_manifest, repair, verified  # noqa: F401
from dssk.store.segments import context_features, encoded_record, write_table  # noqa: F401
