FROM python:3.13-slim

RUN pip install --no-cache-dir --disable-pip-version-check "pg8000>=1.31.3,<2" "PyYAML>=6.0,<7" \
    && useradd --system --no-create-home --uid 10001 attolytics \
    && install -d -o attolytics -m 700 /var/lib/attolytics

COPY attolytics.py /opt/attolytics/attolytics.py
# The example is the default: mount your own over it.
COPY schema-example.conf.yaml /etc/attolytics/schema.conf.yaml

# The spool. Without a volume of its own it is lost with the container.
VOLUME /var/lib/attolytics
WORKDIR /var/lib/attolytics

USER attolytics
ENV PORT=8000 DB_URL=""
EXPOSE 8000

# Any answer will do: the public port says 404 to a path that is not an app's.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["python", "-c", \
    "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/'); c.getresponse()"]

# The URL travels in the environment, where ps does not show its password. Further options may follow
# the image's name.
ENTRYPOINT ["sh", "-c", "ATTOLYTICS_DB_URL=$DB_URL exec python /opt/attolytics/attolytics.py --schema /etc/attolytics/schema.conf.yaml --host 0.0.0.0 --port \"$PORT\" \"$@\"", "attolytics"]
