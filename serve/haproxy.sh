#!/bin/sh
# HAProxy as Ray Serve starts it, with two things of its configuration changed.
#
# Splicing is off. With it a caller that leaves is noticed only when the answer begins, if its headers and its body came
# in two packets, as most clients send them.
#
# While no replica can be reached callers are told so in the form of the API, with a status that says to try again. Ray's
# configuration makes that a plain 500, and a 404 as long as it has no replica to name.
#
# The fallback in it stays, Ray's proxy in Python: it keeps requests while one version of the replicas follows another.
set -eu
config='' before=''
for argument; do
    if [ "$before" = -f ]; then config=$argument; fi
    before=$argument
done
if [ -w "$config" ]; then
    directory=$(dirname "$config")
    body='{"error":{"message":"No engine can be reached at the moment; try again.","type":"service_unavailable","param":null,"code":"engine_unavailable"}}'
    printf '%s' "$body" >"$directory/503.json"
    printf 'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s' \
        "${#body}" "$body" >"$directory/503.http"
    sed -i \
        -e "s|errorfile \(50[234]\) .*|errorfile \1 $directory/503.http|" \
        -e "s|http-request return status 404 content-type text/plain lf-string .*|http-request return status 503 content-type application/json file $directory/503.json hdr retry-after 1|" \
        "$config"
fi
exec "${GRAFT_HAPROXY:?}" -dS "$@"
