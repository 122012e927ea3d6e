"""From the checkpoint a trainer left on disk to an artifact that can be served."""
