# docker build -t simdiff . ; docker run --gpus all -v "$PWD:/data" simdiff run /data/model ...
FROM nvidia/cuda:12.9.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-dev g++
RUN python3 -m venv /opt/simdiff
COPY . /src
RUN /opt/simdiff/bin/pip install --no-cache-dir "/src[toolkit,triton]"

FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/simdiff /opt/simdiff
WORKDIR /data
ENTRYPOINT ["/opt/simdiff/bin/simdiff"]
