# gpt2 in a container: docs/install.md#docker says how to build and run it, for a CPU and for CUDA.
FROM python:3.12-slim

# torch.compile wants a C compiler. The headers of Python are part of the image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# TORCH: a requirement, as torch==2.14.*; PIP_ARGS: options of pip, as the index of the CPU builds.
ARG TORCH="torch>=2.11"
ARG PIP_ARGS=""
# Before the code: a change of it fetches no gigabytes again.
RUN pip install --no-cache-dir $PIP_ARGS "$TORCH"

WORKDIR /opt/gpt2
COPY pyproject.toml README.md LICENSE ./
COPY gpt2 gpt2
COPY configs configs
RUN pip install --no-cache-dir ".[serve,tokenizers]"

# Files that it writes belong to this user; /work is where a folder of yours is put.
RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["gpt2"]
CMD ["--help"]
