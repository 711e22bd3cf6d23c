"""``vllm-gumiho gpu-check``: its parts in their CPU form, and what makes a part fail."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
import typer

from vllm_gumiho.engines.record import record_drafts
from vllm_gumiho.errors import EngineError, GpuCheckError
from vllm_gumiho.gpu_check import command, parts
from vllm_gumiho.gpu_check.command import gpu_check, run_part
from vllm_gumiho.gpu_check.models import Reference, write_models
from vllm_gumiho.gpu_check.parts import FAILS, HOLDS, NOT_RUN, PARTS, Check, Machine, Outcome


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["gumiho", "gumiho-layers", "moa"])
def reference(request, models) -> Reference:
    return Reference(models, request.param)


@pytest.fixture
def check(tmp_path) -> Check:
    return Check(Machine(0), tmp_path, time.monotonic() + 3000)


def dry_run(folder, *names: str) -> dict:
    """The report of these parts on the CPU."""
    gpu_check(output=folder, only=list(names), max_minutes=60, dry_run=True)
    return json.loads((folder / command.REPORT).read_text())["parts"]


def long(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.long)


@pytest.mark.parametrize("name", ["heads kernel", "argmax kernel", "speed of kernels"])
def test_kernels_in_the_interpreter(tmp_path, name):
    part = dry_run(tmp_path, name)[name]
    assert (part["state"], part["problems"]) == (HOLDS, [])
    if name == "heads kernel":  # five numbers of heads, two batch tiles, two paths
        assert part["facts"]["checked"] == 20
    elif name == "argmax kernel":
        assert part["facts"]["ways"] == {"triton": 2, "logits": 1}
    else:
        assert len(part["facts"]["cells"]) == 5 * 2 + 2


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    [
        "V1 graphs",
        *(long(name) for name in ("V1 eager", "V2 eager", "V2 graphs")),
        *(long(f"{runner} graphs, {other}") for runner in ("V1", "V2") for other in ("MoA", "several layers")),
    ],
)
def test_engines_on_the_cpu(tmp_path, name):
    part = dry_run(tmp_path, name)[name]
    assert (part["state"], part["problems"]) == (HOLDS, [])
    assert part["facts"]["drafts"]["equal"] > 20
    assert part["facts"]["engine"]["model_runner"] == name[:2]
    assert any(part["facts"]["accepted"])


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("name", ["tensor parallel 2", "speed of engines"])
def test_ranks_and_speed_on_the_cpu(tmp_path, name):
    part = dry_run(tmp_path, name)[name]
    assert (part["state"], part["problems"]) == (HOLDS, [])
    if name == "tensor parallel 2":
        assert any(part["facts"]["accepted"])
    else:
        assert {len(rates) for rates in part["facts"]["tokens_per_second"].values()} == {2}


TEXT = [3, 17, 90, 4, 55, 120]


def test_a_draft_is_compared_token_by_token(reference):
    right, _ = reference.draft(TEXT, parts.K)
    assert (len(right), reference.compare(TEXT, right)) == (parts.K, "equal")
    assert reference.compare(TEXT, right[:3]) == "equal"
    for position in range(parts.K):
        wrong = [(token + (i == position)) % 160 for i, token in enumerate(right)]
        assert reference.compare(TEXT, wrong) == "wrong"


def test_engines_that_draft_wrongly_do_not_hold(monkeypatch, reference, models, check):
    """Texts are the same whatever is drafted: only the drafts tell."""
    right, _ = reference.draft(TEXT, parts.K)
    found = {"texts": [[1, 2]], "accepted": [1], "engine": {}, "drafts": [[TEXT, right]] * 12}
    check._models = models
    monkeypatch.setattr(check, "_generate", lambda *a, **k: found)

    def outcome() -> Outcome:
        return check.engine("V1 eager", "v1", False, reference.name)

    assert outcome().state == HOLDS
    # The later tokens, as they are where the heads read a damaged vector.
    found["drafts"] = [[TEXT, right[:2] + right[:1:-1]]] * 12
    assert outcome().state == FAILS
    assert "drafts are not the reference's" in outcome().line()
    found["drafts"] = []
    assert outcome().state == FAILS
    found |= {"drafts": [[TEXT, right]] * 12, "texts": [[1, 3]]}
    assert outcome().problems == ["a text is not the target's own"]


def test_ranks_that_accept_otherwise_do_not_hold(monkeypatch, tmp_path):
    accepted = iter([[9, 4], [9, 4], [9, 4], [9, 1]])
    for gpus, state in ((1, NOT_RUN), (2, HOLDS), (2, FAILS)):
        check = Check(Machine(gpus), tmp_path, math.inf)
        check._own_texts = [[1, 2]]
        monkeypatch.setattr(check, "_generate", lambda *a, **k: {"texts": [[1, 2]], "accepted": next(accepted)})
        assert check.tensor_parallel("tensor parallel 2").state == state


class FakeWorker:
    """Answers by what is asked."""

    def __init__(self, **answers):
        self.answers = answers

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, **request):
        return self.answers[do]


def test_kernels_that_are_wrong_or_slow_do_not_hold(monkeypatch, tmp_path):
    check = Check(Machine(1), tmp_path, math.inf)
    cells = [{"what": "5 heads at batch 1", "kernel_us": kernel, "library_us": 100.0} for kernel in (97.0, 98.0)]
    answers = {
        "heads": {"checked": 2, "paths": ["one"], "wrong": ["5 heads at batch 8 by one: off by 3"]},
        "argmax": {"checked": 1, "ways": {"triton": 1}, "wrong": []},
        "times": cells,
    }
    monkeypatch.setattr(check, "worker", lambda *a, **k: FakeWorker(**answers))
    assert check.kernels("heads kernel").line() == "heads kernel: does not hold (5 heads at batch 8 by one: off by 3)"
    assert check.argmax("argmax kernel").state == HOLDS
    slow = check.kernel_speed("speed of kernels")
    assert slow.problems == ["5 heads at batch 1 takes 98 us, the library 100"]


def test_engines_that_lose_by_the_kernels_do_not_hold(monkeypatch, tmp_path):
    check = Check(Machine(1), tmp_path, math.inf)
    monkeypatch.setattr(parts.shapes, "write_models", lambda shape, folder: {"target": folder, "gumiho": folder})
    monkeypatch.setattr(check, "_engine", lambda name, *a, **k: FakeWorker(switch=name.split()[-1]))
    speed = {("0", 1): 100.0, ("0", 8): 100.0, ("0", 32): 100.0, ("0", 64): 100.0}
    speed |= {("auto", 1): 110.0, ("auto", 8): 98.0, ("auto", 32): 96.0, ("auto", 64): 100.0}
    monkeypatch.setattr(check, "_rate", lambda engine, count: speed[engine.answers["switch"], count])
    outcome = check.engine_speed("speed of engines")
    assert outcome.problems == ["0.96 of the speed at batch 32"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("record", [False, True])
def test_drafts_of_v1_are_recorded_without_async_scheduling(monkeypatch, tmp_path, runner, record):
    """A GPU's default: with it the worker keeps V1's drafts to itself."""
    check, jobs = Check(Machine(1), tmp_path, math.inf), []
    monkeypatch.setattr(check, "worker", lambda name, job, **environment: jobs.append(job))
    check._engine("part", runner, {}, "1", record)
    assert jobs[0]["llm"].get("async_scheduling") == (False if record and runner == "v1" else None)


def test_drafts_that_stay_in_the_worker_are_not_watched():
    config = SimpleNamespace(use_v2_model_runner=False, scheduler_config=SimpleNamespace(async_scheduling=True))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(EngineError, match="cannot be watched with async scheduling; give async_scheduling=False"):
        record_drafts(llm)


def test_a_gpus_kernels_are_checked_at_every_shape():
    """Of the issue's list: rows of 5, 40, 128 and 320, and 1, 8, 32 and 64 requests; and both batch tiles' edges."""
    sizes = Machine(1).kernels
    assert {5, 40, 128, 320, 1, 8, 32, 64} <= set(sizes["rows"])
    assert {1, 16, 17, 32} <= set(sizes["batches"])
    assert parts.HEADS == [1, 2, 3, 4, 5]
    assert {1, 8, 32, 64} == set(Machine(1).at_once)


def test_the_parts_of_the_default_drafter_fit_nine_minutes():
    names = list(PARTS)
    first_of_others = next(i for i, name in enumerate(names) if "," in name)
    assert sum(PARTS[name][1] for name in names[:first_of_others]) < 540
    assert all("," in name for name in names[first_of_others:])
    assert sum(estimate for _, estimate in PARTS.values()) < 15 * 60


def test_a_part_that_would_end_late_is_not_started(tmp_path):
    check = Check(Machine(1), tmp_path, time.monotonic() + 30)
    outcome = run_part(check, "V2 graphs", lambda *a: pytest.fail("started"), 60)
    assert (outcome.state, outcome.run) == (NOT_RUN, False)
    assert "s left of the time, 60 needed" in outcome.line()


def test_what_a_part_raises_is_said_and_ends_nothing(monkeypatch, tmp_path):
    def fails(check, part):
        raise EngineError("V2 graphs failed: exit code 1, last line: CUDA error")

    holds = lambda check, part: Outcome(part, why="all")  # noqa: E731
    monkeypatch.setattr(parts, "PARTS", {"one": (fails, 1), "two": (holds, 1)})
    with pytest.raises(typer.Exit) as ended:
        gpu_check(output=tmp_path, dry_run=True, only=None, max_minutes=9)
    assert ended.value.exit_code == 1
    report = json.loads((tmp_path / command.REPORT).read_text())
    assert [part["state"] for part in report["parts"].values()] == [FAILS, HOLDS]
    assert "CUDA error" in report["parts"]["one"]["problems"][0]
    assert report["dry_run"] is True


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(GpuCheckError, match="sees no GPU here; --dry-run"):
        gpu_check(output=tmp_path / "none", only=None, max_minutes=9, dry_run=False)
    with pytest.raises(GpuCheckError, match="no such part; give one of heads kernel, "):
        gpu_check(output=tmp_path / "none", only=["heads"], max_minutes=9, dry_run=True)
    assert not (tmp_path / "none").exists()
