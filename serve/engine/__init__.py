"""The inference engine: vLLM, and everything that Graft changes in it and in FastAPI.

`protocol.Engine` is what the rest of `serve` uses; `vllm_engine.VllmEngine` implements it.
"""
