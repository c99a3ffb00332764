# Trains on NVIDIA's GPUs: their image brings torch, Transformer Engine, NCCL and apex, built for one another.
#
#     docker build -t moe .
#     docker run --gpus all --ipc=host moe doctor
#
# docs/running.md says how to train in it. For another image of theirs, with torch 2.13 or newer on Python 3.11 to
# 3.13: docker build --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3 -t moe .
ARG BASE=nvcr.io/nvidia/pytorch:26.08-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/megatron-moe
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY megatron_moe megatron_moe

# What was compiled for one another stays: torch and its like become constraints, so that a package that wants
# another one ends the build. The image's own constraints (PIP_CONSTRAINT) would keep everything else back too.
# Megatron-Core is the version that the tests run with.
RUN python -m pip list --format=freeze \
        | grep -iE '^(torch|triton|pytorch|numpy|nvidia|cuda|cupy|transformer.engine|apex|flash|deep.ep)' \
        > /tmp/constraints.txt \
    && grep -E '^megatron-core==' constraints/python3.12.txt >> /tmp/constraints.txt \
    && python -c "import torch; print(torch.__version__)" > /tmp/torch.txt \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --constraint /tmp/constraints.txt ".[all]" \
    && python -c "import torch; print(torch.__version__)" | diff /tmp/torch.txt - \
    && python -c "import transformer_engine.pytorch, megatron.core" \
    && rm /tmp/constraints.txt /tmp/torch.txt

COPY configs configs
COPY corpus corpus
COPY scripts scripts

# Any user may run it, also one that the image has no name and no home for (docker run --user "$(id -u):$(id -g)").
# What libraries keep for themselves goes to /tmp, and runs go to /workspace, where a folder is to be mounted.
ENV HOME=/tmp \
    USER=trainer \
    PYTHONUNBUFFERED=1
RUN useradd --uid 2000 trainer && install -d -m 0777 /workspace
USER 2000
WORKDIR /workspace
ENTRYPOINT ["megatron-moe"]
CMD ["--help"]
