"""`import dssk` is light, and yet transformers' Auto classes know its models, in either order of import."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, byte_tokenizer, fused

ORDERS = {
    "dssk first": "import dssk\nfrom transformers import AutoModelForCausalLM as Auto",
    "transformers first": "from transformers import AutoModelForCausalLM as Auto\nimport dssk",
    "package first": "import transformers\nimport dssk\nAuto = transformers.AutoModelForCausalLM",
    "trainer between": "import dssk\nfrom transformers import Trainer\nfrom transformers import AutoModel as Auto",
    "trainer before": "from transformers import Trainer\nimport dssk\nfrom transformers import AutoConfig as Auto",
    "configuration alone": "import dssk\nfrom transformers import AutoConfig as Auto",
    "backbone": "import dssk\nfrom transformers import AutoConfig\nfrom transformers import AutoModel as Auto",
    "room first": "import dssk.inference.auto\nfrom transformers import AutoModelForCausalLM as Auto",
    "pipeline between": "import dssk\nfrom transformers import pipeline\nfrom transformers import AutoModel as Auto",
}


@pytest.fixture(scope="module")
def folder(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    fused(base_path).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_a_fused_model_in_every_order_of_import(folder, order):
    found = python(f"{ORDERS[order]}\nprint(type(Auto.from_pretrained({str(folder)!r})).__name__)")
    assert found.startswith("CrossAttnGPTBigCode")


def test_for_model_knows_it_and_other_models_load_as_ever(folder, base_path):
    code = f"""
import dssk
from transformers import AutoConfig, AutoTokenizer
original = AutoConfig.for_model.__func__.__wrapped__
AutoTokenizer.from_pretrained({str(folder)!r})
assert AutoConfig.for_model.__func__ is original  # transformers is as it was
print(AutoConfig.from_pretrained({str(base_path)!r}).model_type, AutoConfig.for_model("dssk").model_type)
"""
    assert python(code).startswith("gpt_bigcode ")


def test_importing_it_alone_imports_nothing_heavy_and_draws_no_number():
    code = """
import random, sys
random.seed(0)
state = random.getstate()
import dssk
assert random.getstate() == state
print(sorted({"torch", "transformers", "numpy", "pydantic", "datasets"} & set(sys.modules)))
assert dssk.prompts.question("q")
"""
    assert python(code) == "[]"


def test_importing_it_leaves_torchs_random_numbers_alone():
    code = """
import torch
torch.manual_seed(3)
state = torch.get_rng_state()
import dssk
dssk.from_base, dssk.load_model, dssk.ProjectedContext
print(torch.equal(torch.get_rng_state(), state))
"""
    assert python(code) == "True"


def test_public_names_are_there_and_no_others():
    code = """
import dssk
for name in [*dssk.__all__, "CrossAttnGPTBigCodeConfig", "CrossAttnGPTBigCodeForCausalLM", "__version__"]:
    assert getattr(dssk, name) is not None
assert set(dssk.__all__) <= set(dir(dssk))
try: dssk.from_bases
except AttributeError as error: print(error)
"""
    assert python(code) == "module 'dssk' has no attribute 'from_bases'"
