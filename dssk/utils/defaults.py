"""Values that flags and functions share: light to import, so that `--help` answers at once."""

NATURAL_QUESTIONS = "google-research-datasets/natural_questions"  # on the Hub
MAX_NEW_TOKENS = 32  # of an answer
BATCH_SIZE = 32  # questions at a time
STORAGE_DTYPES = ("fp32", "bf16", "fp16", "int8")
CONTROLS = ("with_context", "no_context", "wrong_context", "shuffled_tokens", "other_question")
# What a checkpoint is compared with.
SYSTEMS = ("prompted", "prompted_prefix_cache", "lora_prompted", "full_prompted")
FURTHER_SYSTEMS = ("prompted_examples",)  # that are compared if they are named
RATE_FACTORS = {"lora": 2.0, "full": 0.5}  # of fine-tuned prompting: times the checkpoint's learning rate
FUSED, CROSS_ATTENTION = "fused", "cross_attention"  # what is published: the whole model, or the blocks
PORT = 7860  # of the demo page
LONGEST_TRAINED = 900  # characters of a paragraph that `make real` trains on

LARGEST = 2**31  # number of anything that a flag or an experiment takes
SEEDS = 2**32  # that there are, from 0
