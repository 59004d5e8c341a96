# The image of every pod: Ray and moecluster, run by a user without rights. Two variants:
#
#   docker build --tag moecluster:0.1.0 .
#   docker build --tag moecluster-cuda:0.1.0 --build-arg VARIANT=cuda .
#
# Python is that of constraints.txt; all Ray nodes and clients must have the same. For builds that repeat exactly, pin
# the base by its digest: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG VARIANT=cpu
# PyPI's torch for Linux brings CUDA; this index has the same versions without it, as 2.13.0+cpu, which pip prefers.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/moecluster
ENV PATH=/opt/moecluster/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# By itself, since it is most of the image and changes least.
RUN case "$VARIANT" in \
        cpu) pip install --constraint constraints.txt --extra-index-url "$TORCH_CPU_INDEX" torch ;; \
        cuda) pip install --constraint constraints.txt torch ;; \
        *) echo "VARIANT=$VARIANT: expected cpu or cuda" >&2; exit 2 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY moecluster moecluster
COPY actors actors
# pip compiles bytecode here: the root file system of the pods is read-only.
RUN pip install --constraint constraints.txt '.[serve,ray-serve,plots]' && pip check

FROM ${PYTHON_IMAGE}
# KubeRay's readiness probe of a RayService's workers calls wget.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends wget && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 1000 moecluster && \
    useradd --uid 1000 --gid 1000 --create-home moecluster
COPY --from=build /opt/moecluster /opt/moecluster
ENV PATH=/opt/moecluster/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/moecluster
# By number, so that Kubernetes sees that it is not root.
USER 1000:1000
# No HEALTHCHECK: Kubernetes ignores it, and has probes. No ENTRYPOINT: KubeRay gives each pod its command.
CMD ["moecluster", "--help"]
