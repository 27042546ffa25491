"""The language model's cache under both of its names: `past_key_values` up to transformers 5.23, `cache` since."""

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


# what this transformers calls the cache, as an argument of `forward` and as a field of outputs
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that came under one of its names; a ValueError if it came under both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass the cache once, as cache or as past_key_values (its name before transformers 5.24).")
    return past_key_values if cache is None else cache


def cache_in(kwargs: dict) -> Cache | None:
    """The cache among keyword arguments of `generate`, under either name."""
    return one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))


__all__ = ["CACHE_NAME", "cache_in", "one_cache"]
