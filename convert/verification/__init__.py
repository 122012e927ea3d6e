"""An artifact in the engine it is made for: does vLLM say what golden.json says, and how fast.

verify    the one verb: every check, and a report of them
checks    what is asked of the engine, and the limits
speed     decode speed
engine    vLLM's own server as a child process that never outlives us
client    its HTTP API, over a socket that nobody else can reach
guard     the process between the two
page      what a person sees
"""
