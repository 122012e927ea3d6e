"""Which pool answers a request, and which replica: this one, one of another pool, or one that holds the adapter.

A pool is one base model or merged model with its engines. `resolver.ModelResolver` finds the pool and the revision of a
`model`; `relay.Relay` has another replica answer.
"""
