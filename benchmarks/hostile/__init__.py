"""What nobody should send, store or configure, and what comes of it."""
