"""Models that are measured: built by transformers and PEFT, in float32, from weights of any storage format."""
