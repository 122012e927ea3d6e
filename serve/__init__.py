"""Ray Serve deployments of vLLM engines with hot-swapped adapters behind an OpenAI-compatible API."""
