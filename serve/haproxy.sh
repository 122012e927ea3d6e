#!/bin/sh
# HAProxy without splicing. With it (Ray Serve's configuration asks for it) a caller that leaves is noticed only when the
# answer begins, if its headers and its body came in two packets, as most clients send them.
exec "${GRAFT_HAPROXY:?}" -dS "$@"
