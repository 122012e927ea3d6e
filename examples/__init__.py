"""Examples with a real small model and real fine-tunes of it: training, conversion, serving, a hot-swap under load."""
