"""The two inputs of a conversion: the base model, and the adapter as a trainer left it.

Both are opened and checked, and never changed.

Entry points: `base_model.BaseModel.open` and `adapter_checkpoint.Checkpoint.open`.
"""
