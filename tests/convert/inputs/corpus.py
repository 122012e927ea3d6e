"""Settings of many good adapters, and a conversion of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.artifact import Artifact
from tests.convert.asking import Request, convert
from tests.convert.trained import KINDS, LINEAR

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

GOOD: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"r": rank, "lora_alpha": 2 * rank} for rank in (1, 2, 3, 16, 64, 128)},
    **{f"alpha {alpha}": {"lora_alpha": alpha} for alpha in (1, 7, 32)},
    **{f"targets {'+'.join(targets)}": {"target_modules": targets} for targets in (["q_proj"], ["q_proj", "v_proj"])},
    "attention": {"target_modules": ATTENTION},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "pattern of targets": {"target_modules": r".*layers\.1\..*_proj"},
    "one layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 24}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 5}},
    "all patterns": {"use_rslora": True, "rank_pattern": {"layers.0.mlp.up_proj": 4}, "alpha_pattern": {"k_proj": 1}},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "mica start": {"init_lora_weights": "mica"},
    "dropout": {"lora_dropout": 0.1},
    **{name: settings for name, settings in KINDS.items() if "tokens of" not in name},
    "linear as a whole": LINEAR,
}


def finished(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    request = {"name": "tiny", "measure": False, "route": "merge", "quantize": "none", "dtype": "float16", **settings}
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, **request))
