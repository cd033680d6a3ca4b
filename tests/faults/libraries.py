"""What the package and its tests import of others: each mutant's tests begin with these loaded, and none of ours."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate  # noqa: F401
import bm25s  # noqa: F401
import datasets  # noqa: F401
import hypothesis  # noqa: F401
import matplotlib.figure  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, GPTBigCodeForCausalLM, Trainer  # noqa: F401

torch.set_num_threads(1)
