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
RUN pip install --no-deps -r requirements-freeze.txt
COPY --chmod=755 _wsgi.py LICENSE requirements.txt ./
COPY --chmod=755 celestial_backend celestial_backend/

USER celestial
VOLUME /data
EXPOSE 9090

# The header does no harm where no password is set; a proxy in the environment is not asked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "\
import base64, http.client, os; \
pair = os.environ.get('BASIC_AUTH_USER', '').strip() + ':' + os.environ.get('BASIC_AUTH_PASS', '').strip(); \
link = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 9090), timeout=4); \
link.request('GET', '/health', headers={'Authorization': 'Basic ' + base64.b64encode(pair.encode()).decode()}); \
raise SystemExit(link.getresponse().status != 200)"]

# The worker is a service of its own. On SIGTERM, running requests get some time to end.
CMD ["python", "_wsgi.py", "--no-worker", "--host", "0.0.0.0"]
