# One image for the SuperLink (which starts the ServerApps itself) and for SuperNodes: docker build -t fedsim .
# `fedsim provision` writes the compose files that use it. Wheels from elsewhere too, such as torch without CUDA:
# --build-arg PIP_OPTIONS="--extra-index-url https://..."
FROM python:3.11-slim

ARG PIP_OPTIONS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 HOME=/tmp

WORKDIR /app
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${PIP_OPTIONS} torch
COPY pyproject.toml README.md LICENSE ./
COPY .ci .ci
COPY fedsim fedsim
COPY strategies strategies
COPY clients clients
COPY conf conf
RUN pip install --constraint constraints.txt ${PIP_OPTIONS} '.[flower,data]' \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedsim

USER 10001:10001
CMD ["fedsim", "--help"]
