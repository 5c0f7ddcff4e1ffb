FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    BENTOML_DO_NOT_TRACK=True \
    MODEL_DIR=/data/state \
    BENTOML_HOME=/data/bentoml

# 1001 is the user of Label Studio's image: its uploads can be read through a read-only mount.
RUN useradd --uid 1001 --home-dir /data --create-home celestial

WORKDIR /app
COPY requirements-freeze.txt ./
# The headers are for building C++ beside TensorFlow, and a quarter of a gigabyte.
RUN pip install --no-deps -r requirements-freeze.txt \
 && rm -r "$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/tensorflow/include"
COPY --chmod=755 _wsgi.py LICENSE requirements.txt ./
COPY --chmod=755 celestial_backend celestial_backend/

USER celestial
VOLUME /data
EXPOSE 9090

# A server is asked on its port, a worker by its sign of life in the database.
HEALTHCHECK --interval=30s --timeout=30s --start-period=60s --start-interval=2s \
  CMD ["python", "-m", "celestial_backend.doctor.health"]

# The worker is a service of its own. On SIGTERM, running requests get some time to end.
CMD ["python", "_wsgi.py", "--no-worker", "--host", "0.0.0.0"]
