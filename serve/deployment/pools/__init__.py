"""The pools of a server, from artifacts on.

`bundle` finds the pools of artifacts, `bootstrap` publishes their adapters, and `start` waits for their engines. While
the server runs, a replica records in the catalogue what pools there should be (`changes`), and the server's own process
starts and stops them (`controller`).
"""
