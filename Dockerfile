# All three tasks, in /opt/vrwkv/.venv. Nobody has built this image on the machine where it was written.
#   docker build -t vrwkv .
#   docker build -t vrwkv --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg FORCE_CUDA=1 .
#   docker run --rm -it --gpus all --shm-size 8g -v /path/to/data:/opt/vrwkv/data vrwkv
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vrwkv
COPY . .
# FORCE_CUDA=1 compiles the CUDA kernels although no GPU is in sight during the build.
ARG FORCE_CUDA=0
ARG TORCH_CUDA_ARCH_LIST=8.0;9.0;12.0
RUN FORCE_CUDA=${FORCE_CUDA} TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" make install-dense \
    && rm -rf /root/.cache
ENV PATH=/opt/vrwkv/.venv/bin:${PATH}
CMD ["bash"]
