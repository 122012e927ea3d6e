"""HAProxy, which Ray Serve starts: its configuration, its environment, and how it reaches the replicas of this machine.

`haproxy.sh` is the program that Ray Serve runs as HAProxy. `proxy_map` keeps the map by which it finds the pool of a
request, and `uvicorn_patches` is the end of the connection in a replica.
"""
