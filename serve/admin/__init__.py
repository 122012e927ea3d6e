"""The admin API over HTTP: changes of the catalogue, its content and history, usage, and vLLM's calls to load adapters.

`routes.Admin` has its endpoints; `usage_routes.UsageRoutes` and `vllm_compat.VllmRoutes` add theirs.
"""
