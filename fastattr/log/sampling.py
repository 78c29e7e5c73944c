"""Which responses are kept: decided by a hash of the request id, so that every process decides alike."""

from __future__ import annotations

from hashlib import blake2b

from fastattr.log.config import LogConfig


def share_of(request_id: str) -> float:
    """A number in [0, 1) that is uniform over ids and always the same for one id.

    >>> 0 <= share_of("a") < 1 and share_of("a") == share_of("a")
    True
    """
    digest = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float holds


def rate_before(config: LogConfig, *, error: bool, n_tokens: int) -> float:
    """The rate that is known before a response is explained."""
    rate = config.sample_rate
    if error:
        rate = max(rate, config.error_rate)
    if n_tokens >= config.long_tokens:
        rate = max(rate, config.long_rate)
    return rate
