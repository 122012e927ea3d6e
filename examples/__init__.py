"""A real small model, real fine-tunes of it, and what can be done with them."""
