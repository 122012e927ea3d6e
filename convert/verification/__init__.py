"""Serves an artifact with a real vLLM, and compares its answers with golden.json; measures the speed of decoding, too.

Entry points: `verify.verify` and `speed.measure_speed`.
"""
