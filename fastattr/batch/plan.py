"""What a batch will do, settled and written down before any of it is done.

The same inputs and options give the same plan, the same shards and the same record ids, whoever works on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any, get_args

from fastattr.batch.output import PLAN, Output
from fastattr.batch.sources import Fields, Input
from fastattr.errors import InputError, SaveError
from fastattr.log.config import Images
from fastattr.log.record import Content
from fastattr.types import AttributionConfig

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """Rows that are explained by one worker and published in one step: the unit of work and of commit.

    Attributes:
        number: among all shards, from 0.
        input: which of the plan's.
        start, stop: rows of that input.
        offset: in bytes, where row `start` begins.
        first: the number of row `start` among all rows.
    """

    number: int
    input: int
    start: int
    stop: int
    offset: int
    first: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the output holds.

    Attributes:
        day: on which it was made; parts lie in its folder.
        model: a name that `fastattr.load` knows, or `package.module:function`, which is called with the device.
        dtype: of the model's weights, as for `fastattr.load`.
        max_new_tokens: longest answer of a row without a response.
        images: as of `LogConfig`.
        shard_rows: most rows of a shard.
        limit: the first rows only, or None.
    """

    day: date
    inputs: tuple[Input, ...]
    model: str
    attribution: AttributionConfig
    fields: Fields
    content: Content
    images: Images
    max_new_tokens: int
    shard_rows: int
    limit: int | None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("shard_rows", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")

        for name, allowed in (("content", get_args(Content)), ("images", get_args(Images))):
            if getattr(self, name) not in allowed:
                known = ", ".join(repr(value) for value in allowed)
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        if self.attribution.compat is not None:
            raise InputError(
                f"compat is {self.attribution.compat!r}, which is for states alone; leave it out of a batch"
            )

    @property
    def n_rows(self) -> int:
        return sum(each.n_rows for each in self.inputs)

    def shards(self) -> tuple[Shard, ...]:
        """Every row in exactly one, in order."""
        return tuple(self._shards())

    def _shards(self) -> Iterator[Shard]:
        number = first = 0
        for i, source in enumerate(self.inputs):
            for offset, start in zip(source.offsets, range(0, source.n_rows, self.shard_rows), strict=True):
                stop = min(start + self.shard_rows, source.n_rows)
                yield Shard(number, i, start, stop, offset, first)
                number, first = number + 1, first + stop - start

    @property
    def id(self) -> str:
        """12 hex digits, of everything but the day and where the inputs lie."""
        choices = self.choices()
        if self.dtype == "auto":  # left out, so that plans of versions without dtype keep their id
            del choices["dtype"]
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]

    def choices(self) -> dict[str, Any]:
        """Everything but the day and where the inputs lie, as JSON has it. Equal for equal outputs."""
        inputs = [
            {"name": each.name, "rows": each.n_rows, "bytes": each.n_bytes, "ids": each.ids} for each in self.inputs
        ]
        values = {name: value for name, value in asdict(self).items() if name not in ("day", "inputs")}
        # in the form earlier versions wrote, so that their batches can be continued
        open_choices = {"scales": self.attribution.scales or (), "top_k": self.attribution.known_top_k}
        values["attribution"] = {**values["attribution"], **open_choices}
        return json.loads(json.dumps({**values, "inputs": inputs}))


def writer_of(plan_id: str, shard: int) -> str:
    """The writer's name in the records of a shard."""
    return f"{plan_id}{shard:06d}"


def shard_of(plan_id: str, writer: str) -> int | None:
    """The shard that a writer's name stands for, or None for another plan's."""
    number = writer.removeprefix(plan_id)
    return int(number) if len(number) < len(writer) and number.isdecimal() else None


def settle(plan: Plan, output: Output) -> Plan:
    """Write the plan, or find the same one there and take its day.

    Raises:
        SaveError: the output holds another plan, or records that are of none, or cannot be written.
    """
    stored = output.read(PLAN)
    if stored is None:
        if output.destination.segments():
            raise SaveError(
                f"{output.url!r} holds records but no {PLAN}: they are not of a batch; choose another --out"
            )
        about = {"fastattr_batch": FORMAT, "id": plan.id, "day": plan.day.isoformat(), "rows": plan.n_rows}
        about |= {"shards": len(plan.shards()), **plan.choices()}
        output.write(PLAN, (json.dumps(about, indent=2) + "\n").encode())
        return plan
    try:
        found = {"dtype": "auto", **json.loads(stored)}
        if found["fastattr_batch"] != FORMAT:
            raise ValueError(f"format {found['fastattr_batch']}, this version of fastattr goes on with {FORMAT}")
        day = date.fromisoformat(found["day"])
    except (ValueError, KeyError, TypeError) as error:
        raise SaveError(
            f"{output.url!r} holds a {PLAN} that cannot be read: {error!r}; choose another --out"
        ) from error
    differences = [
        f"{name} is {_short(found.get(name))} there and {_short(value)} here"
        for name, value in plan.choices().items()
        if found.get(name) != value
    ]
    if differences:
        raise SaveError(
            f"{output.url!r} holds another batch: {'; '.join(differences)}. Choose another --out, or delete it"
        )
    return replace(plan, day=day)


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 3:
        value = [*value[:3], f"... {len(value) - 3} more"]
    text = json.dumps(value)
    return text if len(text) <= 600 else text[:597] + "..."
