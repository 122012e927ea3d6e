"""Names of the files that trainers and model libraries write.

Sources: `save_pretrained` of peft 0.21 and of transformers.
"""

from __future__ import annotations

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
MODEL_STEM = "model"
CONFIG = "config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Templates for other uses than plain chats, such as tools: NAME.jinja.
OTHER_CHAT_TEMPLATES = "additional_chat_templates"
PROCESSOR_CHAT_TEMPLATE = "chat_template.json"
GENERATION_CONFIG = "generation_config.json"
# How a multimodal model prepares images: transformers and vLLM read them.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# One of these is a tokenizer; the other files only accompany it.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Written by trainers beside an adapter, and read to find out how it was trained.
TRAINER_FILES = (
    "README.md",
    "args.json",
    "sft_args.json",
    "training_args.yaml",
    "llamaboard_config.yaml",
    "torchtune_config.yaml",
    "original_repo_id.json",
    "graft_training.json",
)
# Every file of a fixed name that is read in a checkpoint or a base, besides the weights.
READ_FILES = frozenset(
    {
        ADAPTER_CONFIG,
        CONFIG,
        CHAT_TEMPLATE,
        PROCESSOR_CHAT_TEMPLATE,
        GENERATION_CONFIG,
        *PROCESSOR_FILES,
        *TOKENIZER_FILES,
        *TRAINER_FILES,
    }
)
