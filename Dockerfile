# syntax=docker/dockerfile:1
# `qpert serve` in a container.
#   CPU: docker build -t qpert .
#   GPU: docker build -t qpert:gpu --build-arg EXTRA=gpu --build-arg LIBRARIES="onnxruntime-gpu[cuda,cudnn]" .
#        (run with --gpus all, and `--provider cuda` at the end)
# The bundle is mounted, not built in: docker run -p 127.0.0.1:8000:8000 -v "$PWD/bundle:/bundle:ro" qpert
# tools/rehearse_container.py runs these steps, the health check and the command without Docker; CI does.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG EXTRA=cpu
ARG LIBRARIES=""
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY runtime runtime
COPY graphs graphs
COPY exporter exporter
COPY calibration calibration
RUN python -m venv /opt/qpert \
    && /opt/qpert/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
        -c constraints.txt ".[${EXTRA},serve]" ${LIBRARIES} \
    && mkdir /opt/qpert/cuda \
    && find /opt/qpert/lib -path '*/nvidia/*/lib/*.so*' -exec ln -st /opt/qpert/cuda {} +

FROM python:${PYTHON}-slim AS serve
# What is written lies in volumes of this user, which needs no name.
RUN install -d -o 10001 -g 10001 /gallery /cache
COPY --from=build /opt/qpert /opt/qpert
ENV PATH="/opt/qpert/bin:$PATH" \
    LD_LIBRARY_PATH=/opt/qpert/cuda \
    HOME=/cache \
    PYTHONUNBUFFERED=1 \
    QPERT_CACHE=/cache \
    QPERT_PORT=8000
USER 10001:10001
EXPOSE 8000
VOLUME ["/gallery", "/cache"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['QPERT_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["qpert", "serve", "/bundle", "--gallery", "/gallery/index", "--host", "0.0.0.0"]
CMD ["--port", "8000"]
