"""Tables of how explaining scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattr.evaluate.tables import markdown

Row = Mapping[str, Any]


def batch_kill_table(header: Row, rows: Sequence[Row]) -> str:
    """A batch that was killed again and again, beside one that was left alone."""
    (row,) = rows
    return markdown(
        ("rows", "parts", "SIGKILL", "rows after it all", "missing", "twice", "not as in an undisturbed run", "doctor"),
        [
            (
                f"{row['scenes']:,}",
                str(row["parts"]),
                str(row["kills"]),
                f"{row['rows']:,}",
                str(row["missing"]),
                str(row["twice"]),
                str(row["unequal"]),
                "nothing lost" if row["healthy"] else "damaged",
            )
        ],
    )


def scaling_table(header: Row, rows: Sequence[Row]) -> str:
    """Throughput, the cost model beside what was measured, and the projection."""

    def of(record: str) -> list[Row]:
        return [row for row in rows if row["record"] == record]

    rates = of("rates")[0]["operations_per_s"]
    model = markdown(
        ("targets", "image tokens", "width", "vocabulary", "used for", "measured", "predicted", "predicted / measured"),
        (
            (
                f"{row['case']['n_targets']:,}",
                " ".join(str(round(row["case"]["edge"] * scale) ** 2) for scale in row["case"]["scales"]),
                f"{row['case']['dim']:,}",
                f"{row['case']['vocab']:,}",
                "the rates" if row["fitted"] else "judging them",
                f"{row['measured_s']:.2f} s",
                f"{row['predicted_s']:.2f} s",
                f"{row['predicted_s'] / row['measured_s']:.2f}",
            )
            for row in of("stages")
        ),
    )
    fitted = markdown(
        ("stage", "operations a second on one thread"), ((name, f"{rate:.3g}") for name, rate in rates.items())
    )
    through = markdown(
        ("what", "how many", "throughput"),
        [
            *(
                (
                    f"rows in a batch, {row['model']}",
                    str(row["batch"]),
                    f"{row['responses_per_s']:g} responses a second",
                )
                for row in of("batch")
            ),
            *(
                ("tokens in a response", f"{row['length']:,}", f"{row['tokens_per_s']:g} tokens a second")
                for row in of("length")
            ),
            *(
                ("processes", str(row["workers"]), f"{row['responses_per_s']:g} responses a second")
                for row in of("workers")
            ),
        ],
    )
    projected = markdown(
        (
            "model",
            "GPUs",
            "GPU-seconds a million responses",
            "hours",
            "forwards",
            "products and rankings",
            "overlap",
            "maps",
            "log",
            "cores that write it",
        ),
        (
            (
                row["model"],
                str(row["gpus"]),
                f"{row['gpu_s_per_million']:,}",
                f"{row['hours_per_million']:g}",
                *(f"{row['shares'][name]:.1%}" for name in ("forwards", "products and rankings", "overlap", "maps")),
                f"{row['log_bytes_per_million'] / 1e9:.0f} GB",
                str(row["writer_cores"]),
            )
            for row in of("projection")
        ),
    )
    gpu, response = header["assumed"], header["response"]
    return (
        f"{header['cpu']}, one thread, torch {header['torch']}.\n\n{through}\n\n{model}\n\n{fitted}\n\n"
        f"**A projection; nothing of it was measured.** Responses of {response['targets']} tokens to {response['prompt']} "
        f"tokens of text and an image of {' + '.join(f'{n:,}' for n in response['image'])} tokens (three scales), with "
        f"evidence. Assumed of an {gpu['name']}: {gpu['flops'] / 1e12:.0f} TFLOP/s, {gpu['forward_share']:.0%} of it in "
        f"forwards and {gpu['product_share']:.0%} in products, {gpu['memory_share']:.0%} of "
        f"{gpu['bytes_per_s'] / 1e12:.2f} TB/s.\n\n{projected}"
    )
