"""`kubectl` as far as the documentation uses it, on a Cluster. What it doesn't know it refuses loudly."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.controllers import KINDS, NAMESPACE, Cluster
from tests.deploy.rehearsal.node.pod import Pod
from tests.deploy.rehearsal.objects import Refused

_TICK_S = 0.2
_DEFAULT_WAIT_S = 30.0  # of kubectl wait
_LONG_NAMES = {
    "svc": "Service",
    "po": "Pod",
    "deploy": "Deployment",
    "secret": "Secret",
    "pvc": "PersistentVolumeClaim",
}
_UNITS = {"s": 1, "m": 60, "h": 3600}
# As kind, minikube and k3s name them: all are the one cluster.
CONTEXTS = ("kind-kind", "minikube", "default")


@dataclass
class Call:
    """A command line without the program, taken apart: `-n graft` is gone."""

    words: list[str]
    options: dict[str, str]
    directory: Path
    data: str


def answer(cluster: Cluster, arguments: list[str], directory: Path, data: str) -> str:
    """The output of the command. Raises Refused with what it prints instead."""
    call = _parsed(arguments, directory, data)
    verbs = {
        "apply": _apply,
        "cp": _copy,
        "create": _create,
        "delete": _delete,
        "exec": _exec,
        "get": _get,
        "kustomize": _kustomize,
        "label": _label,
        "logs": _logs,
        "rollout": _rollout,
        "wait": _wait,
    }
    if call.words[0] not in verbs:
        raise Refused(f"this rehearsal has no kubectl {call.words[0]}")
    return verbs[call.words[0]](cluster, call)


def _parsed(arguments: list[str], directory: Path, data: str) -> Call:
    words, options, position = [], {}, 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            words += arguments[position:]
            break
        if argument in ("-n", "-k", "-f", "-c", "-o"):
            options[argument] = arguments[position + 1]
            position += 1
        elif argument.startswith("--namespace="):
            options["-n"] = argument.partition("=")[2]
        elif argument.startswith("--"):
            name, _, value = argument.partition("=")
            options[name] = value
        else:
            words.append(argument)
        position += 1
    if options.pop("--context", CONTEXTS[0]) not in CONTEXTS:
        raise Refused(f"no context exists with that name; there are {', '.join(CONTEXTS)}")
    if options.get("-n", NAMESPACE) != NAMESPACE:
        raise Refused(f"this rehearsal has one namespace, {NAMESPACE}")
    return Call(words, options, directory, data)


def target(name: str) -> tuple[str, str]:
    """`deployment/graft` as kind and name."""
    kind, _, name = name.partition("/")
    (long,) = [each for each in KINDS if kind.lower() == each.lower()] or [_LONG_NAMES[kind]]
    return long, name


def _apply(cluster: Cluster, call: Call) -> str:
    if "-k" in call.options:
        text = _real(call, "kustomize", call.options["-k"])
    elif call.options["-f"] == "-":
        text = call.data
    else:
        text = (call.directory / call.options["-f"]).read_text()
    documents = [document for document in yaml.safe_load_all(text) if document]
    # The order of kubectl: what others lie in comes first.
    documents.sort(key=lambda document: document["kind"] != "Namespace")
    return "\n".join(_taken(cluster, call, document) for document in documents) + "\n"


def _taken(cluster: Cluster, call: Call, document: Document, *, create: bool = False) -> str:
    if document["kind"] not in KINDS:
        raise Refused(f'no matches for kind "{document["kind"]}" in version "{document["apiVersion"]}"')
    if document["kind"] != "Namespace":
        document["metadata"].setdefault("namespace", call.options.get("-n", "default"))
    return cluster.objects.apply(document, create=create)


def _create(cluster: Cluster, call: Call) -> str:
    """The real kubectl makes the object."""
    arguments = [f"{name}={value}" for name, value in call.options.items() if name.startswith("--")]
    text = _real(call, *call.words, *arguments, "--dry-run=client", "--output=yaml")
    if call.options.get("--dry-run") == "client":
        return text
    return _taken(cluster, call, yaml.safe_load(text), create=True) + "\n"


def _real(call: Call, *arguments: str) -> str:
    result = subprocess.run(
        ["kubectl", *arguments], cwd=call.directory, capture_output=True, text=True, check=False, timeout=60
    )
    if result.returncode:
        raise Refused(result.stderr)
    return result.stdout


def _delete(cluster: Cluster, call: Call) -> str:
    kind, name = target("/".join(call.words[1:]))
    if "--ignore-not-found" in call.options and cluster.objects.find(kind, name) is None:
        return ""
    if kind == "Namespace":
        cluster.delete_all()
    else:
        cluster.delete(kind, name, grace_s=1 if "--now" in call.options else None)
    return f'{kind.lower()} "{name}" deleted\n'


def _exec(cluster: Cluster, call: Call) -> str:
    separator = call.words.index("--")
    result = next(iter(_pod(cluster, call.words[1]).containers.values())).run(call.words[separator + 1 :])
    if result.returncode:
        raise Refused(result.stderr.decode())
    return result.stdout.decode()


def _get(cluster: Cluster, call: Call) -> str:
    if call.words[1:] == ["pods"]:
        return described(cluster)
    kind, name = target("/".join(call.words[1:]))
    document = cluster.objects.find(kind, name)
    if document is None and (kind, name) != ("Namespace", "default"):
        raise Refused(f'{kind} "{name}" not found')
    if call.options.get("-o") == "name":
        return f"{kind.lower()}/{name}\n"
    value: object = document
    path = re.fullmatch(r"jsonpath=\{\.(.*)\}", call.options["-o"])
    if path is None:
        raise Refused("this rehearsal has kubectl get with -o jsonpath only")
    for part in re.split(r"(?<!\\)\.|(?=\[)", path[1]):
        key = int(part[1:-1]) if part.startswith("[") else part.replace("\\.", ".")
        value = value[key]  # type: ignore[index]
    return str(value)


def _kustomize(_: Cluster, call: Call) -> str:
    return _real(call, *call.words)


def _label(cluster: Cluster, call: Call) -> str:
    kind, name, (label, _, value) = call.words[1], call.words[2], call.words[3].partition("=")
    document = cluster.objects.find(*target(f"{kind}/{name}"))
    if document is None:
        raise Refused(f'{kind} "{name}" not found')
    labels = document["metadata"].get("labels", {}) | {label: value}
    return cluster.objects.apply({**document, "metadata": document["metadata"] | {"labels": labels}}) + "\n"


def _rollout(cluster: Cluster, call: Call) -> str:
    if call.words[1] != "status":
        raise Refused(f"this rehearsal has no kubectl rollout {call.words[1]}")
    return _until(cluster, call, call.words[2], "available")


def _logs(cluster: Cluster, call: Call) -> str:
    kind, name = target(call.words[1])
    pods = cluster.pods_of(kind, name)
    if not pods:
        raise Refused(f"no pods of {call.words[1]}")
    container = call.options.get("-c") or pods[-1].template["spec"]["containers"][0]["name"]
    if not pods[-1].log(container).exists():
        raise Refused(f'container "{container}" in pod "{pods[-1].name}" is waiting to start')
    return pods[-1].log(container).read_text(errors="replace")


def _wait(cluster: Cluster, call: Call) -> str:
    return _until(cluster, call, call.words[1], call.options["--for"].removeprefix("condition="))


def _until(cluster: Cluster, call: Call, written: str, condition: str) -> str:
    kind, name = target(written)
    if cluster.objects.find(kind, name) is None:
        raise Refused(f'{kind} "{name}" not found')
    text = call.options.get("--timeout")
    seconds = float(text[:-1]) * _UNITS[text[-1]] if text else _DEFAULT_WAIT_S
    deadline = time.monotonic() + seconds
    while not cluster.condition(kind, name, condition):
        if time.monotonic() > deadline or (
            (kind, condition) == ("Job", "complete") and cluster.condition(kind, name, "failed")
        ):
            raise Refused(f"timed out waiting for the condition on {written}\n{described(cluster)}")
        time.sleep(_TICK_S)
    return f"{written} condition met\n"


def _copy(cluster: Cluster, call: Call) -> str:
    """`kubectl cp` runs tar in the container."""
    source, (name, _, destination) = call.directory / call.words[1], call.words[2].partition(":")
    pod = _pod(cluster, name)
    container = next(iter(pod.containers.values()))
    if container.run(["test", "-d", destination]).returncode == 0:
        destination = f"{destination}/{source.name}"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(source, arcname=destination.lstrip("/"))
    result = container.run(["tar", "--extract", "--file=-", "--directory=/", "--no-same-owner"], packed.getvalue(), 300)
    if result.returncode:
        raise Refused(result.stderr.decode())
    return ""


def _pod(cluster: Cluster, name: str) -> Pod:
    (pod,) = [pod for pod in cluster.pods() if pod.name == name]
    return pod


def described(cluster: Cluster) -> str:
    """Every pod with the end of its logs, for whoever has to find out why something didn't come."""
    lines = [f"not scheduled: {reason}" for reason in cluster.not_scheduled.values()]
    for pod in cluster.pods():
        lines.append(f"pod {pod.name}: {pod.phase}, ready {pod.ready}, restarts {pod.restarts} {pod.waits_for}")
        lines += [f"--- {name}\n{pod.log(name).read_text(errors='replace')[-3000:]}" for name in pod.containers]
    return "\n".join(lines)


def secret(cluster: Cluster, name: str, key: str) -> str:
    document = cluster.objects.find("Secret", name)
    assert document is not None
    return base64.b64decode(document["data"][key]).decode()
