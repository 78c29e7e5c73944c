"""A batch on a local Ray cluster whose worker is killed, and rows for a step of Ray Data. Prints one line of JSON.

A script: Ray has processes and warnings of its own, which do not concern pytest.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data

from fastattr import AttributionConfig
from fastattr.batch import RayExplainer, ray_engine, run

LENS = AttributionConfig(method="lens", scales=(1.0,), filter=False, evidence=False)


def main(source: str, out: str, flag: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    engine = partial(ray_engine.run, workers=2)
    options: dict[str, Any] = {"model": "tests.batch.loaders:killed_once", "attribution": LENS, "shard_rows": 6}
    job = run(source, out, engine=engine, **options)
    again = run(source, out, engine=engine, **options)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()][1:4]
    rows[1]["image"] = "none.png"
    ray.data.DataContext.get_current().enable_progress_bars = False
    given = {"attribution": LENS, "folder": str(Path(source).parent)}
    explained = ray.data.from_items(rows).map_batches(
        RayExplainer, fn_constructor_kwargs=given, batch_format="pyarrow", batch_size=2, concurrency=1
    )
    kept = ("request_id", "status", "error_type")
    steps = sorted([row[name] for name in kept] for row in explained.take_all())
    killed = Path(flag).exists()
    print(json.dumps({"job": asdict(job), "again": asdict(again), "killed": killed, "steps": steps}))


if __name__ == "__main__":
    main(*sys.argv[1:])
