"""Finds out whether an adapter was trained on full-precision weights (LoRA) or on 4-bit weights (QLoRA): from the files
that trainers leave, or by a measurement of the weights and of the losses, which can show a QLoRA only.

Entry points: `detect.detect`, `quantization_alignment.measure_training`.
"""
