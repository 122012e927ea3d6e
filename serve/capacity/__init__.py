"""Plans capacity without a server: the memory of a GPU, and the GPUs for a given traffic.

`size.fit` says what fits on a GPU; `advice.advise` says which adapters to merge, by Erlang's formula and `simulate`.
"""
