#!/bin/sh
# HAProxy as Ray Serve starts it, with six things of its configuration changed.
#
# Splicing is off. With it a caller that leaves is noticed only when the answer begins, if its headers and its body came
# in two packets, as most clients send them.
#
# A request is passed on when its body is here, or as much of it as a buffer holds. HAProxy asks another replica in place
# of one that died only what it had whole when it began to send: of a body in a packet of its own it has no copy.
#
# That a caller has left is for the replica itself to see, where it answers for the engine: Ray Serve would run two tasks
# more for each request to see it first.
#
# A replica of this machine is reached through its Unix socket, if it has one (`serve/listening.py`).
#
# While no replica can be reached callers are told so in the form of the API, with a status that says to try again. Ray's
# configuration makes that a plain 500, and a 404 as long as it has no replica to name.
#
# Its page of counts and its metrics for Prometheus are off. Everybody who reaches the machine could read them, nobody
# does, and a port that is taken would keep all of HAProxy from starting.
#
# The fallback in it stays, Ray's proxy in Python: it keeps requests while one version of the replicas follows another.
set -eu
config='' before=''
for argument; do
    if [ "$before" = -f ]; then config=$argument; fi
    before=$argument
done

reply() { # status, its name, a further header with its \r\n, type, code, message
    body=$(printf '{"error":{"message":"%s","type":"%s","param":null,"code":"%s"}}' "$6" "$4" "$5")
    printf 'HTTP/1.1 %s %s\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s' \
        "$1" "$2" "$3" "${#body}" "$body" >"$directory/$1.http"
}

if [ -w "$config" ]; then
    directory=$(dirname "$config")
    patience_s=${GRAFT_BODY_TIMEOUT_S:-30}
    reply 503 'Service Unavailable' 'retry-after: 1\r\n' service_unavailable engine_unavailable \
        'No engine can be reached at the moment; try again.'
    printf '%s' "$body" >"$directory/503.json"
    reply 408 'Request Timeout' '' invalid_request_error body_too_slow \
        "The request body did not arrive within $patience_s s."
    rules="\\n    http-request wait-for-body time ${patience_s}s if METH_POST"
    rules="$rules\\n    http-request del-header x-request-disconnect-disabled"
    rules="$rules\\n    http-request set-header x-request-disconnect-disabled ?1 if METH_POST !{ path_beg /admin }"
    sed -i \
        -e "s|errorfile \(50[234]\) .*|errorfile \1 $directory/503.http|" \
        -e "s|http-request return status 404 content-type text/plain lf-string .*|http-request return status 503 content-type application/json file $directory/503.json hdr retry-after 1|" \
        -e '/^frontend prometheus$/a\    disabled' \
        -e '/^listen stats$/a\    disabled' \
        -e "/^frontend http_frontend/a\\    errorfile 408 $directory/408.http$rules" \
        "$config"
    for socket in "${GRAFT_SOCKETS:-/nowhere}"/*.sock; do
        if [ -S "$socket" ]; then
            replica=$(basename "$socket" .sock)
            sed -i -e "s|^\( *server [^ ]*-$replica\) [^ ]*|\1 unix@$socket|" "$config"
        fi
    done
fi
exec "${GRAFT_HAPROXY:?}" -dS "$@"
