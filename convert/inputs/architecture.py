"""Names of the weights of Llama's architecture, which Mistral, Qwen and others share, as transformers names them."""

from __future__ import annotations

import re

LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYER_LINEAR = re.compile(rf"model\.layers\.(?P<layer>\d+)\.(?:{'|'.join(map(re.escape, LAYER_LINEARS))})")
EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_MODULE = EMBEDDING.removesuffix(".weight")
HEAD = "lm_head"
HEAD_WEIGHT = f"{HEAD}.weight"
OTHER_WEIGHTS = re.compile(
    r"model\.(?:norm\.weight|layers\.\d+\.(?:\w+layernorm\.weight|self_attn\.(?:[qk]_norm\.weight|"
    r"rotary_emb\.inv_freq)|(?:self_attn|mlp)\.\w+_proj\.bias))"
)
