#!/bin/bash
# Where the real one isn't installed: passes signals on to the command, and reaps what it leaves.
[ "$1" = -- ] && shift
"$@" &
child=$!
trap 'kill -TERM $child' TERM
trap 'kill -INT $child' INT
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || exit "$code"
done
