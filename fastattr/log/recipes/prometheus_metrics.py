"""The logger's counts for Prometheus, through the OpenTelemetry SDK's exporter. The logger itself knows only the API.

    python -m fastattr.log.recipes.prometheus_metrics runs/attr --port 9464
    curl http://127.0.0.1:9464/metrics | grep fastattr

Worth an alert: `rate(fastattr_log_failed_total[5m]) > 0`, `rate(fastattr_log_dropped_total{reason="queue_full"}[5m]) > 0`.
"""

from __future__ import annotations

import argparse
import signal

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from prometheus_client import start_http_server

import fastattr
from fastattr.log import AttributionLogger
from fastattr.log.recipes.answering import log_scenes


def main(destination: str, port: int, n: int) -> None:
    resource = Resource.create({"service.name": "shapes-server"})
    provider = MeterProvider([PrometheusMetricReader()], resource=resource)
    metrics.set_meter_provider(provider)  # once a process, before or after the logger is made
    server, thread = start_http_server(port, addr="127.0.0.1")
    model = fastattr.load("shapes")
    with AttributionLogger(destination, sample_rate=0.5) as logger:
        log_scenes(model, logger, n)
        logger.flush()
        print(f"metrics at http://127.0.0.1:{server.server_port}/metrics until SIGINT or SIGTERM", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})  # yours goes on serving instead
    server.shutdown()
    server.server_close()
    thread.join()
    provider.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", help="directory or URL of the records")
    parser.add_argument("--port", type=int, default=9464)
    parser.add_argument("--n", type=int, default=10, help="answers before it waits")
    chosen = parser.parse_args()
    # no thread may take the signals that `main` waits for
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main(chosen.destination, chosen.port, chosen.n)
