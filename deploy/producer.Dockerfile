# The commands of batchmill (submit, results, db upgrade and so on), without torch.
# Build it from the repository's root: docker build -f deploy/producer.Dockerfile -t batchmill-producer:0.1.0 .
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
        "batchmill[postgres] @ file://$(echo /wheels/batchmill-*.whl)"

FROM python:3.12-slim-trixie
RUN groupadd --gid 10001 batchmill \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/batchmill --shell /usr/sbin/nologin batchmill
COPY --from=build /opt/batchmill /opt/batchmill
ENV PATH=/opt/batchmill/bin:$PATH \
    HOME=/var/lib/batchmill \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/batchmill
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["batchmill"]
