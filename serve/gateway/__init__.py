"""The HTTP side of a replica: authenticates a request, enforces the policy, and dispatches it to an engine.

`app.Gateway` is the ASGI application. It is built with a `request_policy.RequestPolicy` and `routing.peers.Peers`.
"""
