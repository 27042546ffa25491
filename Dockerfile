# AlignGPT's commands in a container, as a user without rights.
#
#   docker build -t aligngpt .
#   docker build -t aligngpt-gpu --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#   docker run --rm aligngpt recipes
#   docker run --rm -p 8000:8000 -v "$PWD/runs:/data" aligngpt serve --model quickstart/instruct --host 0.0.0.0
ARG BASE=python:3.11-slim
FROM ${BASE}

# python:3.11-slim has Python; CUDA's images do not
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)

WORKDIR /opt/aligngpt
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY modeling_aligngpt modeling_aligngpt
COPY shared shared
COPY trainers trainers
COPY hub hub
COPY recipes recipes
COPY playground playground

ARG EXTRAS=train,serve,demo,playground
RUN python3 -m venv /opt/venv && \
    /opt/venv/bin/pip install --no-cache-dir -c constraints.txt torch && \
    /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" && \
    useradd --create-home --uid 10001 aligngpt && mkdir /data && chown aligngpt /data

USER aligngpt
WORKDIR /data
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/aligngpt/.cache/huggingface
ENTRYPOINT ["aligngpt"]
CMD ["--help"]
