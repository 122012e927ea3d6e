"""Keeps a server in the state that `adapters.yaml` describes, through the admin API.

`desired_state.DesiredState` is the file, `diff` and `apply` beside it the steps; `file_watch.FileWatcher` repeats them
when the file changes, and `admin_client.AdminClient` calls the server.
"""
