#!/bin/sh
# HAProxy as Ray Serve starts it, with nine changes to the configuration that Ray Serve writes. The script ends with an
# error if a line that it changes is not there: then this version of Ray writes another configuration.
#
# 1. Splicing is off (-dS). With splicing HAProxy notices a client's disconnect only when the answer begins, if headers
#    and body arrived in two packets, as most clients send them.
#
# 2. A request is passed on when its whole body has arrived, or as much of it as a buffer holds. HAProxy can retry on
#    another replica only what it held when it began to send: it keeps no copy of a body that came in a later packet.
#
# 3. Requests that the engine answers carry a header that tells Ray Serve not to watch for a disconnect. The replica
#    does that itself, and Ray Serve would run two more tasks for each request.
#
# 4. A replica of this machine is reached through its Unix socket, if it has one (`uvicorn_patches.py`).
#
# 5. While no replica can be reached, clients get a 503 in the form of the API, with a header to retry. Ray Serve would
#    answer with a plain 500, and with a 404 as long as it knows no replica. HAProxy's other
#    answers, which are HTML, get that form too, but for those to what it can't parse as HTTP: they can't be changed.
#
# 6. The page of statistics and the metrics for Prometheus are off. Everyone who reaches the machine could read them,
#    nothing does, and a port that is taken would keep HAProxy from starting.
#
# 7. The exporter of metrics reads what HAProxy itself answered from a socket that only this user opens and that changes
#    nothing (serve/observability/proxy.py). Requests that no replica saw are counted nowhere else.
#
# 8. The fallback server is removed: Ray's proxy in Python, which keeps every request, also a health check, without an
#    answer until there is a replica again. That takes as long as a model needs to load.
#
# 9. With several pools, a request goes to the pool of its `model`, which is looked up in a map file. HAProxy reads it from
#    what it holds of the body. Every other request goes to the first pool, or to another one while that has no replica;
#    so does one for a pool without a replica, for example while its engines start.
#    The name `*` is in the map while there are several pools (serve/deployment/proxy/proxy_map.py).
set -eu
config='' before=''
for argument; do
    if [ "$before" = -f ]; then config=$argument; fi
    before=$argument
done

fail() { # message
    echo "haproxy.sh: $config: $1. This version of Ray writes another configuration than Graft changes." >&2
    exit 1
}

require() { # pattern of a line
    grep -q -e "$1" "$config" || fail "no line matches '$1'"
}

change() { # pattern of a line, commands of sed for the lines that match it
    require "$1"
    sed -i -e "/$1/$2" "$config"
}

reply() { # status, its name, a further header with its \r\n, type, code, message
    body=$(printf '{"error":{"message":"%s","type":"%s","param":null,"code":"%s"}}' "$6" "$4" "$5")
    printf 'HTTP/1.1 %s %s\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s' \
        "$1" "$2" "$3" "${#body}" "$body" >"$directory/$1.http"
}

tell_statistics_to_the_exporter() {
    statistics=${GRAFT_METRICS:+$GRAFT_METRICS/haproxy.stats}
    # A server without this metric is better than none: a path too long for a socket keeps HAProxy from starting.
    if [ -n "$statistics" ] && [ "${#statistics}" -le 80 ] && mkdir -p "$GRAFT_METRICS" 2>/dev/null \
        && [ -w "$GRAFT_METRICS" ]; then
        change '^ *stats socket ' "i\    stats socket $statistics mode 600 level user"
        refuse_health_checks_apart
    fi
}

# Without a replica a health check gets its 503 from the frontend: a backend would count it with the requests of callers,
# and a pod that starts is asked every few seconds.
refuse_health_checks_apart() {
    nobody=''
    for backend in $(sed -n 's/^backend \([^ ]*\)$/\1/p' "$config"); do
        if [ "$backend" != default_backend ]; then nobody="$nobody !{ nbsrv($backend) ge 1 }"; fi
    done
    refusal="http-request return status 503 content-type application/json file $directory/503.json hdr retry-after 1"
    change '^frontend http_frontend$' "a\    $refusal if { path /health }$nobody"
}

answer_errors_as_the_api() {
    patience_s=${GRAFT_BODY_TIMEOUT_S:-30}
    reply 408 'Request Timeout' '' invalid_request_error body_too_slow \
        "The request body did not arrive within $patience_s s."
    reply 400 'Bad Request' '' invalid_request_error malformed_request \
        'The proxy can not serve this request: it is not complete, or not valid HTTP.'
    reply 413 'Payload Too Large' '' invalid_request_error body_too_large 'The request is too large; send less at once.'
    reply 500 'Internal Server Error' '' server_error server_error 'The proxy had an error with this request.'
    reply 501 'Not Implemented' '' invalid_request_error not_implemented \
        'The proxy has not implemented what this request asks of HTTP.'
    reply 503 'Service Unavailable' 'retry-after: 1\r\n' service_unavailable engine_unavailable \
        'No engine can be reached at the moment; try again.'
    printf '%s' "$body" >"$directory/503.json"
    for status in 502 503 504; do
        change "^ *errorfile $status " "s|errorfile .*|errorfile $status $directory/503.http|"
    done
    change '^ *http-request return status 404 content-type text.plain lf-string ' \
        "s|http-request .*|http-request return status 503 content-type application/json file $directory/503.json hdr retry-after 1|"
}

pass_on_whole_requests() {
    rules="    errorfile 408 $directory/408.http"
    for status in 400 413 500 501; do rules="$rules\\n    errorfile $status $directory/$status.http"; done
    rules="$rules\\n    http-request wait-for-body time ${patience_s}s if METH_POST"
    # Of replicas alone, which ask each other directly (serve/gateway/routing/forwarding.py).
    rules="$rules\\n    http-request del-header x-graft-forwarded"
    rules="$rules\\n    http-request del-header x-graft-epoch"
    rules="$rules\\n    http-request del-header x-request-disconnect-disabled"
    rules="$rules\\n    http-request set-header x-request-disconnect-disabled ?1 if METH_POST !{ path_beg /admin }"
    if [ -n "${GRAFT_POOLS:-}" ]; then
        model="req.body,json_query('$.model'),field(1,@)"
        several="{ str(*),map($GRAFT_POOLS) -m found }"
        rules="$rules\\n    http-request set-var(txn.pool) $model,map($GRAFT_POOLS) if METH_POST !{ path_beg /admin } $several"
    fi
    change '^frontend http_frontend$' "a\\$rules"
}

send_to_pools() {
    first=$(sed -n -e 's|^ *acl is_\([^ ]*\) path_beg /$|\1|p' "$config")
    if [ -n "${GRAFT_POOLS:-}" ]; then
        require '^ *default_backend '
        if [ "$(grep -c '^backend http-' "$config")" != "$(grep -c '^ *acl is_[^ ]* path_beg /' "$config")" ]; then
            fail "not every backend of an application has a line 'acl is_BACKEND path_beg PREFIX'"
        fi
        known=''
        for pool in $(sed -n -e 's/^backend \(http-[^ ]*\)$/\1/p' "$config"); do
            # Requests for a pool that is being started go to the first one, whose replica waits for it.
            if [ "$pool" = "$first" ]; then running=''; else running=" { nbsrv($pool) gt 0 }"; fi
            known="$known    use_backend $pool if { var(txn.pool) -m str $pool }$running\n"
        done
        sed -i -e "0,/^ *\(use\|default\)_backend /s~^ *\(use\|default\)_backend ~$known&~" "$config"
    fi
    # The names of the other backends, and what the paths of their applications begin with. No caller addresses those.
    sed -n -e 's|^ *acl is_\([^ ]*\) path_beg \(/pools/[^ ]*\)/$|\1 \2|p' "$config" | while read -r pool prefix; do
        name=$(printf '%s' "$pool" | sed -e 's/[.]/[.]/g')
        change "^ *use_backend $name if is_$name\$" d
        change "^backend $name\$" "a\\    http-request set-path $prefix%[path]"
        if [ -n "$first" ]; then
            spare="use_backend $pool if { nbsrv($first) eq 0 } { nbsrv($pool) gt 0 }"
            change "^ *use_backend $first if is_$first\$" "i\\    $spare"
        fi
    done
}

send_to_replicas_only() {
    sed -i -e '/^ *server SERVE_PROXY_ACTOR[^ ]* .* backup$/d' "$config"
    # When HAProxy starts there may be no server yet: only the form of the lines can be checked.
    if grep -e '^ *server ' "$config" | grep -q -v -e '^ *server SERVE_REPLICA_'; then
        fail "a line 'server' names neither a replica nor the fallback"
    fi
}

reach_replicas_by_socket() {
    # A replica that starts has a socket and no line yet: only the form of the lines can be checked.
    if grep -e '^ *server ' "$config" | grep -q -v -e '^ *server [^ ][^ ]* \(unix@\|[^ ]*:[0-9]\)'; then
        fail "a line 'server' is not NAME HOST:PORT"
    fi
    for socket in "${GRAFT_SOCKETS:-/nowhere}"/*.sock; do
        if [ -S "$socket" ]; then
            replica=$(basename "$socket" .sock)
            sed -i -e "s|^\( *server [^ ]*-$replica\) [^ ]*|\1 unix@$socket|" "$config"
        fi
    done
}

if [ -w "$config" ]; then
    if ! grep -q '^# changed by haproxy.sh$' "$config"; then
        directory=$(dirname "$config")
        answer_errors_as_the_api
        pass_on_whole_requests
        send_to_pools
        send_to_replicas_only
        tell_statistics_to_the_exporter
        change '^frontend prometheus$' 'a\    disabled'
        change '^listen stats$' 'a\    disabled'
        sed -i -e '1i\# changed by haproxy.sh' "$config"
    fi
    reach_replicas_by_socket
fi
exec "${GRAFT_HAPROXY:?}" -dS "$@"
