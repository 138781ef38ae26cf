# A worker. Build it from the repository's root: docker build -f deploy/worker.Dockerfile -t batchmill-worker:0.1.0 .
# A plain Python image is enough: the torch that pip installs on Linux brings the CUDA libraries that it was built
# with, and the NVIDIA Container Toolkit brings the driver's in when a container starts. The machine's driver has to
# be new enough for that CUDA.
FROM python:3.12-slim-trixie AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY jobs ./jobs
COPY producer ./producer
COPY worker ./worker
COPY migrations ./migrations
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels .
RUN python -m venv --without-pip /opt/batchmill \
    && pip --python /opt/batchmill install --no-cache-dir --constraint constraints.txt \
        "batchmill[worker,postgres] @ file://$(echo /wheels/batchmill-*.whl)"

FROM python:3.12-slim-trixie
RUN groupadd --gid 10001 batchmill \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/batchmill --shell /usr/sbin/nologin batchmill
COPY --from=build /opt/batchmill /opt/batchmill
# A volume comes over HOME, so that fetched models outlive the container.
ENV PATH=/opt/batchmill/bin:$PATH \
    HOME=/var/lib/batchmill \
    HF_HOME=/var/lib/batchmill/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/batchmill
USER 10001:10001
STOPSIGNAL SIGTERM
# `batchmill worker` replaces itself by `python -m batchmill.worker`, so signals reach the worker itself.
ENTRYPOINT ["batchmill"]
