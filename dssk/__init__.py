"""Cached context for frozen StarCoder-family models through a few trained cross-attention blocks.

Importing this package lets transformers' Auto classes load the models it saves; it does nothing else.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from dssk import prompts
from dssk.models.configuration import CrossAttnGPTBigCodeConfig
from dssk.models.cross_attention import ProjectedContext
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM

__all__ = ["CrossAttnGPTBigCodeConfig", "CrossAttnGPTBigCodeForCausalLM", "ProjectedContext", "prompts"]

AutoConfig.register(CrossAttnGPTBigCodeConfig.model_type, CrossAttnGPTBigCodeConfig, exist_ok=True)
AutoModelForCausalLM.register(CrossAttnGPTBigCodeConfig, CrossAttnGPTBigCodeForCausalLM, exist_ok=True)

# `python -m dssk.library` is `dssk library`: the commands are found as if they lay here.
__path__.append(str(Path(__file__).parent / "commands"))
