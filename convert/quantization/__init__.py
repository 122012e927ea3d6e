"""Quantization formats of linear layers, and which of them vLLM serves on which target.

Entry points: `nf4.Nf4`, `compressed.Compressed`, `llmcompressor.quantize_calibrated` and `targets.support`.
"""
