"""What the manifests say, run on this machine as a cluster would.

`documentation` takes the commands out of a page, `laptop` types them, `programs` and `kubectl` answer them, `objects`
admits and keeps what they apply, `controllers` makes pods of it, `node` runs them. `images` reads from the Dockerfile
what an image would say; `engineless` is the server of the rehearsals that start no engine.
"""
