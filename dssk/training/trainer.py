"""transformers' Trainer, saving only what trains."""

from pathlib import Path

from safetensors.torch import load_file
from transformers import Trainer

from dssk.checkpoint import finish_checkpoint
from dssk.models.modeling import WEIGHTS_FILE, is_cross_attn


class CrossAttnTrainer(Trainer):
    """Trainer for a `CrossAttnGPTBigCodeForCausalLM`: checkpoints hold the cross-attention weights alone."""

    def __init__(self, *args, label_smoothing: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    def compute_loss(self, model, inputs, *args, **kwargs):
        # Trainer's own smoother does not shift the labels of models it does not know.
        smoothing = self.label_smoothing if model.training else 0.0
        return super().compute_loss(
            model, {**inputs, "label_smoothing": smoothing, "skip_logits": True}, *args, **kwargs
        )

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Write weights, configuration and tokenizer; not the pickled arguments, whose content we keep as JSON."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = state_dict or {n: p for n, p in model.named_parameters() if is_cross_attn(n)}
        model.save_pretrained(folder, cross_attn_only=True, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            finish_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        model.load_cross_attention(load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE))
