"""The experiments: the only place where values of hyper-parameters live.

What each key means is written beside its type in `dssk/config.py`. A group is a list of experiments; a list as a
value makes one experiment of each of its elements. Add a key here and there, never a flag.
"""

BASE_CONFIG = {
    "model_path": "bigcode/starcoderbase-1b",
    "num_cross_attn_layers": 4,
    "cross_attn_layers_stride": 2,
    "cross_attn_shared_weights": True,
    "cross_attn_dropout_prob": 0.3,
    "cross_attn_final_layer": False,
    "cross_attn_shared_projections": False,
    "cross_attn_hidden_size": None,
    "cross_attn_num_attention_heads": None,
    "cross_attn_num_key_value_heads": None,
    "cross_attn_init": "zero",
    "context_size": 2048,
    "include_context_ids": True,
    "do_repetition_augmentations": False,
    "loss_on": "all",
    "encode_online": False,
    "group_by_length": True,
    "train_batch_size": 16,
    "test_batch_size": 16,
    "skip_steps": 1,
    "learning_rate": 6e-4,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "adam_moments": "bf16",  # a third less of every checkpoint
    "weight_decay": 5e-2,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "fp16": True,
    "bf16": False,
    "gradient_checkpointing": True,
    "seed": 0,
}

# Bases that are no StarCoder 1: blocks built as the base's own layers are, and room for each to learn apart.
MODERN_CONFIG = {
    **BASE_CONFIG,
    "cross_attn_shared_weights": False,
    "cross_attn_final_layer": True,
    "cross_attn_num_key_value_heads": "base",
    "cross_attn_norm": "base",
    "cross_attn_mlp": "base",
    "context_size": 4096,
    "include_context_ids": False,  # most have no tokens for fill-in-the-middle
    "lr_scheduler_type": "cosine",
    "weight_decay": 1e-2,
    "fp16": False,
    "bf16": True,
}

MERGED_CONFIG = {
    **MODERN_CONFIG,
    "model_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "reader": "merged",
    "encode_layer": 18,
    "encode_online": True,  # in minutes no context is seen twice
    "cross_attn_dropout_prob": 0.0,
    "num_cross_attn_layers": 6,
    "cross_attn_layers_stride": 5,
    "context_size": 1024,
    "loss_on": "answer",
    "questions_per_context": 4,
    "train_batch_size": 16,
    "test_batch_size": 16,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.02,
    "adam_beta2": 0.98,
    "bf16": False,
    "gradient_checkpointing": False,
}

REPLAY_CONFIG = {
    **MERGED_CONFIG,
    "reader_replay": 12,
    "decoder_lora": {"rank": 16, "alpha": 128},
    "bf16": True,
    "attn_implementation": "eager",
}

# The embedded default.
TINY_CONFIG = {
    **BASE_CONFIG,
    "model_path": "runs/demo/seed-0/base",
    "num_cross_attn_layers": 2,
    "cross_attn_layers_stride": 1,
    "cross_attn_shared_weights": False,
    "cross_attn_dropout_prob": 0.0,
    "cross_attn_final_layer": True,  # a block before layer 0 would not see the question
    "context_size": 256,
    "include_context_ids": False,
    "train_batch_size": 32,
    "test_batch_size": 64,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0625,
    "adam_beta2": 0.98,
    "weight_decay": 1e-2,
    "fp16": False,
    "gradient_checkpointing": False,
}

EXP_GROUPS = {
    # The embedded default: minutes on a laptop's CPU. Its base is made by `make demo`.
    "crossattn_tiny": [
        TINY_CONFIG,
    ],
    # The merged reader on the same questions. One layer gathers what is asked and a later one looks it up: it wants
    # more than two. `dssk base --dataset toy --layers 4 --output runs/merged/base` makes them.
    "merged_tiny": [
        {
            **TINY_CONFIG,
            "model_path": "runs/merged/base",
            "reader": "merged",
            "decoder_lora": {"rank": 32},
            "learning_rate": 4e-3,
        }
    ],
    # Blocks again, and each question reads up to ten contexts: which of them has the answer is learned, from a start
    # that compares words. Two wide heads tell more names apart than many narrow ones.
    "crossattn_tiny_contexts": [
        {
            **TINY_CONFIG,
            "cross_attn_init": "overlap",
            "cross_attn_num_attention_heads": 2,
            "learning_rate": 1.5e-3,
            "num_contexts": [[1, 10]],
            "distractors": {"neighbours": 1.0, "batch": 1.0},
            "gold_missing": 0.08,
            "contexts_warmup": 4,
        }
    ],
    # Real text on a CPU: a base of a few million parameters made by `dssk base --text ...`.
    "crossattn_small": [
        {
            **BASE_CONFIG,
            "model_path": "runs/squad/base",
            "num_cross_attn_layers": 3,
            "cross_attn_layers_stride": 1,
            "cross_attn_shared_weights": False,
            "cross_attn_dropout_prob": 0.0,
            "cross_attn_final_layer": True,
            "cross_attn_init": "copy",  # from zero such a base takes far longer to look at the context
            "context_size": 512,
            "include_context_ids": False,
            "train_batch_size": 32,
            "test_batch_size": 64,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.06,
            "adam_beta2": 0.98,
            "weight_decay": 1e-2,
            "fp16": False,
            "gradient_checkpointing": False,
        }
    ],
    "crossattn_santacoder": [
        {
            **BASE_CONFIG,
            "model_path": "TabbyML/SantaCoder-1B",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 2,
            "train_batch_size": 5,
            "test_batch_size": 5,
            "skip_steps": 8,
            "learning_rate": 3e-4,
            "weight_decay": 5e-4,
            "lr_scheduler_type": "cosine",
        }
    ],
    "crossattn_starcoder": [
        {
            **BASE_CONFIG,
            "model_path": "bigcode/starcoder",
            "num_cross_attn_layers": 8,
            "cross_attn_layers_stride": 4,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 16,
        }
    ],
    "crossattn_starcoderbase-1b": [
        {
            **BASE_CONFIG,
            "model_path": "bigcode/starcoderbase-1b",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 3,
            "train_batch_size": 2,
            "test_batch_size": 2,
            "learning_rate": 2e-4,
            "weight_decay": 5e-1,
            "lr_scheduler_type": "reduce_lr_on_plateau",
        }
    ],
    "crossattn_starcoderbase-3b": [
        {
            **BASE_CONFIG,
            "model_path": "bigcode/starcoderbase-3b",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 6,
            "cross_attn_shared_weights": False,
            "cross_attn_dropout_prob": 0.4,
            "cross_attn_final_layer": True,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 16,
            "context_size": 4096,
            "train_batch_size": 4,
            "test_batch_size": 4,
            "skip_steps": 32,
            "learning_rate": 5e-4,
            "weight_decay": 1e-3,
            "lr_scheduler_type": "cosine",
        }
    ],
    "crossattn_starcoderbase-7b": [
        {
            **BASE_CONFIG,
            "model_path": "bigcode/starcoderbase-7b",
            "num_cross_attn_layers": 8,
            "cross_attn_layers_stride": 4,
            "cross_attn_dropout_prob": 0.4,
            "cross_attn_final_layer": True,
            "cross_attn_shared_projections": True,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 1e-4,
            "weight_decay": 1e-2,
            "lr_scheduler_type": "cosine",
        }
    ],
    "crossattn_starchat-alpha": [
        {
            **BASE_CONFIG,
            "model_path": "HuggingFaceH4/starchat-alpha",
            "num_cross_attn_layers": 4,
            "cross_attn_layers_stride": 8,
            "cross_attn_shared_weights": False,
            "cross_attn_dropout_prob": 0.25,
            "cross_attn_final_layer": True,
            "cross_attn_shared_projections": True,
            "cross_attn_hidden_size": 2048,
            "cross_attn_num_attention_heads": 32,
            "context_size": 4096,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 2e-4,
            "weight_decay": 1e-2,
            "lr_scheduler_type": "cosine",
            "fp16": False,
            "bf16": True,
        }
    ],
    # The Hub's; `dssk base smollm2 --output DIR` makes a 4-bit copy without it: --set model_path=DIR.
    "crossattn_smollm2-135m": [
        {
            **MODERN_CONFIG,
            "model_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 5,
            "cross_attn_dropout_prob": 0.1,
            "context_size": 2048,
            "train_batch_size": 8,
            "test_batch_size": 8,
            "skip_steps": 4,
            "learning_rate": 5e-4,
            "gradient_checkpointing": False,
        }
    ],
    # The same base, read with its own attention from states of a middle layer: answers well after minutes on a CPU.
    # `make real` trains it.
    "merged_smollm2-135m": [MERGED_CONFIG],
    # Better answers from the same states for more work in reading them: layers above the stored one are run again, and
    # adapters learn with the maps. They want a higher rate than maps, which their scale gives them. bfloat16 is twice
    # as fast on a processor that has it, and many times slower on one that has not.
    "merged_replay_smollm2-135m": [REPLAY_CONFIG],
    # The state of a lower layer beside it, which the lower layers' maps read as well: better answers, twice the bytes.
    "merged_replay_two_smollm2-135m": [{**REPLAY_CONFIG, "encode_layer": "9+18"}],
    "crossattn_qwen3-0.6b": [
        {
            **MODERN_CONFIG,
            "model_path": "Qwen/Qwen3-0.6B",
            "num_cross_attn_layers": 7,
            "cross_attn_layers_stride": 4,
            "context_size": 2048,
            "train_batch_size": 4,
            "test_batch_size": 4,
            "skip_steps": 8,
            "learning_rate": 4e-4,
        }
    ],
    "crossattn_llama-3.2-1b": [
        {
            **MODERN_CONFIG,
            "model_path": "meta-llama/Llama-3.2-1B",
            "num_cross_attn_layers": 4,
            "cross_attn_layers_stride": 4,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 16,
            "context_size": 2048,
            "train_batch_size": 4,
            "test_batch_size": 4,
            "skip_steps": 8,
            "learning_rate": 4e-4,
        }
    ],
    "crossattn_gemma-2-2b": [
        {
            **MODERN_CONFIG,
            "model_path": "google/gemma-2-2b",
            "num_cross_attn_layers": 5,
            "cross_attn_layers_stride": 5,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "train_batch_size": 2,
            "test_batch_size": 2,
            "skip_steps": 16,
            "learning_rate": 3e-4,
        }
    ],
    "crossattn_starcoder2-3b": [
        {
            **MODERN_CONFIG,
            "model_path": "bigcode/starcoder2-3b",
            "num_cross_attn_layers": 5,
            "cross_attn_layers_stride": 6,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 16,
            "include_context_ids": True,
            "train_batch_size": 2,
            "test_batch_size": 2,
            "skip_steps": 16,
            "learning_rate": 3e-4,
        }
    ],
    "crossattn_starcoder2-7b": [
        {
            **MODERN_CONFIG,
            "model_path": "bigcode/starcoder2-7b",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 5,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "include_context_ids": True,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 2e-4,
        }
    ],
    "crossattn_mistral-7b": [
        {
            **MODERN_CONFIG,
            "model_path": "mistralai/Mistral-7B-v0.3",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 5,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 2e-4,
        }
    ],
    "crossattn_llama-3.1-8b": [
        {
            **MODERN_CONFIG,
            "model_path": "meta-llama/Llama-3.1-8B",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 5,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 2e-4,
        }
    ],
    "crossattn_qwen3-8b": [
        {
            **MODERN_CONFIG,
            "model_path": "Qwen/Qwen3-8B",
            "num_cross_attn_layers": 6,
            "cross_attn_layers_stride": 6,
            "cross_attn_hidden_size": 1024,
            "cross_attn_num_attention_heads": 8,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 2e-4,
        }
    ],
    "crossattn_starcoder2-15b": [
        {
            **MODERN_CONFIG,
            "model_path": "bigcode/starcoder2-15b",
            "num_cross_attn_layers": 8,
            "cross_attn_layers_stride": 4,
            "cross_attn_hidden_size": 2048,
            "cross_attn_num_attention_heads": 16,
            "include_context_ids": True,
            "train_batch_size": 1,
            "test_batch_size": 1,
            "skip_steps": 32,
            "learning_rate": 1e-4,
        }
    ],
}
