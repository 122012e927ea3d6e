"""What the manifests say, run on this machine as a cluster would: for `make rehearse-kubectl`.

`documentation` takes the commands out of a page, `laptop` types them, `kubectl` answers them, `objects` admits and
keeps what they apply, `controllers` makes pods of it, `pod` runs them with `volumes`, `variables`, `container` and
`probes` in the `network`. `images` reads from the Dockerfile what an image would say.
"""
