# leanlift on a CUDA card: torch's wheel brings CUDA, so the host needs NVIDIA's driver and container
# toolkit alone.
#
#     docker build --tag leanlift .
#     docker run --rm --gpus all --volume leanlift-cache:/cache --volume "$PWD:/work" leanlift doctor
#
# Another torch: --build-arg TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

FROM python:3.12-slim AS wheel
WORKDIR /source
RUN pip install --no-cache-dir build
COPY . .
RUN python -m build --wheel --outdir /dist

FROM python:3.12-slim
ARG TORCH="torch==2.13.0"
# Triton compiles a small launcher for each kernel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# first, so that a change of leanlift alone does not fetch it again
RUN pip install --no-cache-dir $TORCH
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)[plots,images,serving,triton]"

# checkpoints, plans and compiled kernels; any user may write there, for docker run --user
RUN useradd --uid 1000 --create-home leanlift \
    && mkdir /cache /work \
    && chmod 1777 /cache /work
ENV HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1
VOLUME /cache
WORKDIR /work
USER leanlift
ENTRYPOINT ["leanlift"]
CMD ["--help"]
