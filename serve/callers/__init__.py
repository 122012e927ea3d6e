"""The callers of the gateway: their keys and identity tokens, their rate limits, and their usage.

`keys.KeyRing` and `oidc.Issuer` authenticate a caller, `rate_limits.Limiter` admits its requests by a shared
`ledger.RateLimitBackend`, and `usage.Meter` counts them.
"""
