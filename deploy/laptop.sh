#!/usr/bin/env bash
# From a laptop with Docker and an empty cluster to the first answer (docs/tutorials/laptop-cluster.md).
#
#   deploy/laptop.sh kind|minikube|k3s [CHECKPOINT BASE NAME]
#
# CHECKPOINT and BASE are directories: what a fine-tune left, and the model that it started from. NAME is what callers
# ask for. Without them a small model is downloaded and fine-tuned. Run it again after a failure: it keeps what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly convert_image=localhost/graft-convert:0.1.0 serve_image=localhost/graft-serve:0.1.0-cpu
readonly work=build/laptop port=${PORT:-8000} cluster=${1:-}
readonly checkpoint=${2:-build/tutorial/checkpoints/pirate} base=${3:-build/tutorial/base} name=${4:-pirate}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

step() { printf '\n%4d s  %s\n' "$SECONDS" "$*"; }
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}
in_graft() { kubectl --context="$context" --namespace=graft "$@"; }
apply_k() { kubectl --context="$context" apply -k "$1"; }

check() {
    case $cluster in
    kind) context=kind-${KIND_CLUSTER_NAME:-kind} needs="docker kind kubectl curl" ;;
    minikube) context=${MINIKUBE_PROFILE:-minikube} needs="docker minikube kubectl curl" ;;
    k3s) context=${K3S_CONTEXT:-default} needs="docker k3s sudo kubectl curl" ;;
    *) fail "usage: deploy/laptop.sh kind|minikube|k3s [CHECKPOINT BASE NAME]" ;;
    esac
    case $# in
    1) ;;
    4) [ -d "$checkpoint" ] && [ -d "$base" ] || fail "$checkpoint or $base is not a directory." ;;
    *) fail "Give CHECKPOINT, BASE and NAME, or none of them." ;;
    esac
    for program in $needs; do
        command -v "$program" >/dev/null || fail "$program is not installed, or not in PATH."
    done
    kubectl --context="$context" get namespace default -o name >/dev/null ||
        fail "kubectl reaches no cluster as '$context': start it first (docs/tutorials/laptop-cluster.md)."
    mkdir -p "$work"
}

prepare_checkpoint() { # of the tutorial, unless it is there
    if [ -d "$checkpoint" ] && [ -d "$base" ]; then return; fi
    make environment
    .venv/bin/python -m examples.base_model "$base"
    .venv/bin/python -m examples.finetune pirate --base "$base" --out "$checkpoint"
}

build_images() {
    docker build --target convert -t "$convert_image" .
    docker build --target serve-cpu -t "$serve_image" .
}

load_images() {
    case $cluster in
    kind) kind load docker-image "$convert_image" "$serve_image" ;;
    minikube)
        minikube image load "$convert_image"
        minikube image load "$serve_image"
        ;;
    k3s) docker save "$convert_image" "$serve_image" | sudo k3s ctr images import - ;;
    esac
}

create_secrets() { # the key stays in $work, so that a second run has it
    if [ ! -s "$work/keys.json" ]; then
        local printed
        printed=$(docker run --rm --entrypoint sh "$serve_image" -c \
            'python -m serve key create laptop --keys-file /tmp/keys.json && cat /tmp/keys.json')
        (umask 077 && grep -o -m1 '^graft-[A-Za-z0-9_-]*' <<<"$printed" >"$work/key")
        sed -n '/^{/,$p' <<<"$printed" >"$work/keys.json"
    fi
    in_graft create secret generic graft-keys --from-file=keys.json="$work/keys.json" --dry-run=client -o yaml |
        in_graft apply -f -
    in_graft get secret graft-admin -o name >/dev/null 2>&1 ||
        in_graft create secret generic graft-admin \
            --from-literal=admin.token="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
}

copy_into_volume() { # copy_into_volume DIRECTORY NAME: unless it is there. A conversion knows its files by their inodes
    local place=/srv/graft/checkpoints/$2 list='find . -type f -exec cksum {} +'
    if [ "$(in_graft exec graft-loader -- sh -c "cd $place 2>/dev/null && $list || true" | sort)" != \
        "$(cd "$1" && eval "$list" | sort)" ]; then
        in_graft exec graft-loader -- rm -rf "$place" # `kubectl cp` would copy into it
        in_graft cp "$1" "graft-loader:$place"
    fi
}

load_checkpoint() {
    apply_k deploy/overlays/checkpoints
    in_graft wait --for=condition=ready --timeout=5m pod/graft-loader
    copy_into_volume "$base" base
    copy_into_volume "$checkpoint" "$name"
    in_graft delete pod graft-loader --now
}

convert_checkpoint() {
    mkdir -p "$work/conversion"
    cat >"$work/conversion/kustomization.yaml" <<EOF
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: graft
resources: [../../../deploy/overlays/convert-base]
configMapGenerator:
  - name: graft-conversion
    behavior: merge
    literals: ["CHECKPOINT=$name", "NAME=$name"]
EOF
    in_graft delete job graft-convert-base --ignore-not-found # a Job can't be changed; a finished artifact is kept
    apply_k "$work/conversion"
    local deadline=$((SECONDS + 1800))
    until in_graft wait --for=condition=complete --timeout=5s job/graft-convert-base 2>/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || fail "The conversion has not ended in 30 minutes." "$(in_graft get pods)"
        if in_graft wait --for=condition=failed --timeout=1s job/graft-convert-base 2>/dev/null; then
            in_graft logs job/graft-convert-base
            fail "The conversion failed: the log above says why. Mend the checkpoint and run this again."
        fi
    done
    in_graft logs job/graft-convert-base
}

ask() {
    local question='"messages": [{"role": "user", "content": "What is the capital of Italy?"}], "max_tokens": 64'
    : >"$work/port-forward.log" # what an earlier run left would be taken for this one's
    kubectl --context="$context" --namespace=graft port-forward svc/graft "$port:8000" >>"$work/port-forward.log" 2>&1 &
    until grep -q 'Forwarding from' "$work/port-forward.log"; do
        kill -0 $! 2>/dev/null || fail "$(cat "$work/port-forward.log")" "If port $port is in use, set PORT to another."
        sleep 0.2
    done
    curl --silent --show-error --fail-with-body \
        "localhost:$port/v1/chat/completions" -d "{\"model\": \"$name\", $question}" \
        -H "authorization: Bearer $(cat "$work/key")" -H 'content-type: application/json'
}

check "$@"
step "images, and a checkpoint beside them"
prepare_checkpoint >"$work/checkpoint.log" 2>&1 &
preparing=$!
build_images
load_images
wait "$preparing" || fail "$(cat "$work/checkpoint.log")" "There is no checkpoint: the log above says why."
step "namespace, secrets, server"
kubectl --context="$context" apply -f deploy/overlays/dev/namespace.yaml
create_secrets
apply_k deploy/overlays/dev
step "the checkpoint into the cluster"
load_checkpoint
step "conversion"
convert_checkpoint
step "the server starts"
in_graft wait --for=condition=available --timeout=15m deployment/graft
step "the first answer"
ask
cat <<EOF


The first answer came after $SECONDS s. To ask more:
  kubectl --context=$context -n graft port-forward svc/graft $port:8000 &
  curl localhost:$port/v1/models -H "authorization: Bearer \$(cat $work/key)"
To remove it all:
  kubectl --context=$context delete namespace graft && rm -r $work
EOF
