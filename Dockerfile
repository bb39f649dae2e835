# Image of grab_jax for a cluster. DEVICE is cpu, cuda or tpu:
#   docker build --build-arg DEVICE=cuda --tag grab_jax:cuda .
#   docker run --gpus=all --volume="$PWD/runs:/runs" grab_jax:cuda --flagfile=experiments/quickstart.flags --run_dir=/runs/q
# Compiled programs are kept in the volume /cache; results go where --run_dir says.
FROM python:3.12-slim

ARG DEVICE=cpu
ENV PYTHONUNBUFFERED=1 OPENBLAS_NUM_THREADS=1 GRAB_JAX_CACHE=/cache/xla HF_HOME=/cache/huggingface

# The dependencies come first: a change of the code leaves this layer as it is.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY grab_jax/__init__.py grab_jax/
RUN case "$DEVICE" in cpu) extra=trackers ;; cuda) extra=trackers,cuda13 ;; tpu) extra=trackers,tpu ;; \
      *) echo "DEVICE=$DEVICE: expected cpu, cuda or tpu" >&2; exit 2 ;; esac \
    && pip install --no-cache-dir --no-compile --editable ".[$extra]"
COPY grab_jax grab_jax
COPY experiments experiments

# Any user may be given (docker run --user); this one is not root and owns the cache.
RUN useradd --create-home --uid 1000 grab && mkdir -p /cache /runs && chown grab /cache /runs && chmod 1777 /cache /runs
USER 1000
VOLUME /cache
ENTRYPOINT ["python", "-m", "grab_jax.main"]
CMD ["--helpshort"]
