"""The artifact: the directory that `convert` publishes and `serve` reads, with its manifest, digests and signature.
And what both read in directories that others made: JSON, links, chat templates.

Entry points: `Artifact.open` and `signature.sign`. The package imports only pydantic and cryptography, for `serve`.
"""

from convert.artifact.digests import digest, file_digests, file_sha256, size_bytes
from convert.artifact.directory import ADAPTER_DIR, CHECKPOINT_DIR, GOLDEN, MANIFEST, MODEL_DIR, Artifact
from convert.artifact.golden import GOLDEN_CHAT_ARGUMENTS, Golden, GoldenCanary, GoldenChat, GoldenPrompt
from convert.artifact.manifest import (
    SCHEMA,
    VLLM_LORA_RANKS,
    Adapter,
    Base,
    Canaries,
    FileDigests,
    Manifest,
    Model,
    Name,
    Origin,
    Quality,
    QuantizationName,
    Recovery,
    RelativePath,
    Retention,
    Route,
    RouteName,
    Sha256,
    Trial,
    problems_of,
    reason_of,
)

__all__ = [
    "ADAPTER_DIR",
    "CHECKPOINT_DIR",
    "GOLDEN",
    "GOLDEN_CHAT_ARGUMENTS",
    "MANIFEST",
    "MODEL_DIR",
    "SCHEMA",
    "VLLM_LORA_RANKS",
    "Adapter",
    "Artifact",
    "Base",
    "Canaries",
    "FileDigests",
    "Golden",
    "GoldenCanary",
    "GoldenChat",
    "GoldenPrompt",
    "Manifest",
    "Model",
    "Name",
    "Origin",
    "Quality",
    "QuantizationName",
    "Recovery",
    "RelativePath",
    "Retention",
    "Route",
    "RouteName",
    "Sha256",
    "Trial",
    "digest",
    "file_digests",
    "file_sha256",
    "problems_of",
    "reason_of",
    "size_bytes",
]
