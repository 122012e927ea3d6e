"""Reads and writes safetensors files in pieces, and hashes them meanwhile. Headers are checked as untrusted input.

Entry points: `tensors.Tensors`, `reader.TensorReader` and `shards.ShardWriter`.
"""
