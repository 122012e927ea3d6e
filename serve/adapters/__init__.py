"""Adapters in the replicas: published in two phases, verified, loaded, evicted, and split for a canary or shadow.

`publish.Control` changes the catalogue for all replicas. `reconcile.Reconciler` has one replica follow it, with a
`pool.AdapterPool` that holds the adapters of its engine; `rollout.Rollouts` is the replica's part of a split.
"""
