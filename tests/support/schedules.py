"""Schedules of a tiny pair: what `auto` is asked, and what is stored for it."""

from __future__ import annotations

from types import SimpleNamespace

from fakes import PARALLEL, fake_target, measurement

from vllm_gumiho.request import resolve
from vllm_gumiho.tuning import auto, storage
from vllm_gumiho.tuning.measure import record_of
from vllm_gumiho.tuning.settings import Plan


def fake_engine(**changes) -> SimpleNamespace:
    settings = {"kv_cache_dtype": "auto", "enforce_eager": True, "tensor_parallel_size": 1, "max_num_seqs": 2}
    return SimpleNamespace(**{"load_format": "auto"} | settings | changes)


def target(**changes) -> SimpleNamespace:
    found = fake_target(**changes)
    found.dtype, found.quantization, found.max_model_len = "torch.float32", None, 512
    return found


def spec_for(checkpoint, **more) -> dict:
    return {"method": "gumiho", "model": str(checkpoint), "num_speculative_tokens": "auto", **more}


def identity(checkpoint, engine=None, pair=None, spec=None) -> dict:
    pair = pair or target()
    return storage.identity(resolve(spec or spec_for(checkpoint), pair), engine or fake_engine(), pair)


def stored(checkpoint, **changes) -> dict:
    """A record for the pair, saved."""
    key = identity(checkpoint)
    record = record_of(key, measurement(), 1, Plan(max_batch=2)) | changes
    storage.save(record)
    return record


def settle(checkpoint, data_parallel: int = 1, max_num_seqs: int | None = 2, **more):
    ranks = {"data_parallel_size": data_parallel, "data_parallel_size_local": data_parallel}
    parallel = SimpleNamespace(**vars(PARALLEL) | ranks)
    request = resolve(spec_for(checkpoint, **more), target(), parallel)
    settled = auto.settle(request, fake_engine(max_num_seqs=max_num_seqs), target(), parallel)
    return settled and settled.spec
