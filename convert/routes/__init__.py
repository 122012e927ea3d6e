"""The ways from a checkpoint to an artifact: which there are (`ways`), which is taken (`choose`), and the work.

adapter   the adapter stays separate, on its base: hot-swappable, shared between fine-tunes
merge     the delta goes into the weights: one plain model
"""
