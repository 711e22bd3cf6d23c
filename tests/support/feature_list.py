"""The rows of the feature matrix, docs/features.md, which ``python tests/support/feature_list.py`` writes.

Which test proves a row, and in which model runner, is read from the tests: ``@pytest.mark.feature(name, runner)``.
For vLLM's next release it is read from the record of the last ``make test-next`` too: what passed there.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from places import ROOT, TESTS

PAGE = ROOT / "docs" / "features.md"
RECORD = ROOT / "docs" / "results" / "vllm-0.33.json"
RUNNERS = ("V1", "V2")
SAME, DISTRIBUTION = "same tokens", "same distribution"
LIKE_OFF, LIKE_EAGLE, REFUSED = "refused as without Gumiho", "refused as with EAGLE", "refused with the remedy"
UNTOUCHED = "untouched"
LONGEST = 10  # Words of a note that a cell still holds.

# Name, what holds, and what else there is to know.
FEATURES: dict[str, tuple[str, str]] = {
    "greedy requests: continuous batching, every K, K by batch size": (SAME, ""),
    "sampling: temperature, top-p, top-k; greedy and probabilistic drafts": (
        DISTRIBUTION,
        "G-test of the first tokens together, 5,000 draws a setting; long form: 20,000, and 800 in V2 at T=1",
    ),
    "8-bit draft weights": (
        SAME,
        "fp8 and int8, drafts those of the quantised reference; 8-bit checkpoints as they are",
    ),
    "chunked prefill": (SAME, "prompts longer than `max_num_batched_tokens`"),
    "prefix caching": (
        SAME,
        "hit, partial hit, after eviction (V2: a hit); as with EAGLE, the last matching block is recomputed, by vLLM "
        "0.33 only where another token follows it",
    ),
    "preemption and recompute": (SAME, ""),
    "requests joining, finishing and aborted": (SAME, "no KV block is left in use"),
    "prompts and outputs up to max_model_len": (SAME, "the others of a batch draft on"),
    "positions beyond the draft's max_position_embeddings": (SAME, "drafts go on"),
    "stop strings and stop tokens": (SAME, ""),
    "end of sequence inside a draft": (SAME, ""),
    "min_tokens": (SAME, ""),
    "max_tokens reached inside a draft": (SAME, ""),
    "logprobs": (SAME, "values within 0.001"),
    "prompt_logprobs": (SAME, "values within 0.001"),
    "repetition, presence and frequency penalties": (SAME, ""),
    "bad words": (SAME, ""),
    "allowed tokens": (SAME, ""),
    "logit_bias and min_p": (LIKE_EAGLE, "by vLLM, with any speculation"),
    "custom logits processors": (LIKE_EAGLE, "by vLLM, with any speculation"),
    "per-request seeds": (
        "repeatable",
        "by default not the draws of speculation off, and others again where a step's token budget cuts drafts short; "
        "the CPU build fails with a seeded prompt in chunks in V1, with or without Gumiho",
    ),
    "seeded text as without speculation": (
        SAME,
        'sampled requests with a seed, by `"seeded_text": "same"`; greedy drafts; refused in V1 with the remedy',
    ),
    "n > 1": (SAME, ""),
    "structured output: JSON schema, regex, grammar, choice": (SAME, "xgrammar"),
    "async scheduling": (SAME, "vLLM turns it off on a CPU: the test turns it on"),
    "draft length by request": (
        SAME,
        "greedy and probabilistic drafts, and sampled tokens' joint distribution; full drafts under async scheduling",
    ),
    "adaptive verification": (SAME, "vLLM's manager, with step times made up; on a GPU it wants full CUDA graphs"),
    "watermarked drafts": (SAME, "dual_key_gumbel with probabilistic drafts; greedy requests are not watermarked"),
    "tensor parallel": (
        SAME,
        "2 workers; draft over both or one; heads whole on each, or shared out; not in V2, as each worker would need "
        "the interpreter",
    ),
    "data parallel": (SAME, "2 engines; `LLM` alone refuses it as without Gumiho; not in V2, as above"),
    "pipeline parallel": (REFUSED, "the embedding and the LM head are on different workers; before a runner is chosen"),
    "target in eight bits (compressed-tensors W8A8 on the CPU)": (SAME, ""),
    "target in four bits (GPTQ and AWQ on the CPU)": (SAME, "in bfloat16, with a target that rejects few drafts"),
    "LoRA adapters on the target": (
        SAME,
        "drafts are made without the adapter; V1 is taken by default, and V2 is refused: that of vLLM 0.32 gives "
        "adapters of the LM head wrong rows with any draft model, and fails in the CPU build (tested with EAGLE)",
    ),
    "sleep and wake": (
        LIKE_OFF,
        "the CPU build has no sleep mode; level 2 was run with device memory stood in for; vLLM reads the target's "
        'weights anew, and keeps a draft\'s by `sleep_preserve_parameter_names=["draft.*"]`; untested on a GPU',
    ),
    "embedding models": (UNTOUCHED, ""),
    "n-gram and EAGLE speculation, and none": (UNTOUCHED, ""),
}

HEAD = """# Features

Each row is proven by tests that start real engines, on the CPU build of vLLM with tiny models in float32.
*Same tokens* means token ids, text and reasons of ending equal to speculation off under greedy decoding, while drafts
were accepted and, but for a few cases that end at once, rejected (by vLLM's own counters). The columns have the model
runners in which it holds. `make test` proves that of vLLM 0.32. That of 0.33 is what passed in the last `make
test-next`, whose record is [vllm-0.33.json](results/vllm-0.33.json): {passed:,} tests passed, {failed} failed and
{skipped} were skipped on {date}, with 0.33's Python on the CPU libraries of 0.32.

vLLM takes model runner V2 by default where Triton is installed, as on GPUs, and V1 in the CPU build
(`VLLM_USE_V2_MODEL_RUNNER` decides). V2 runs here under Triton's interpreter, and most rows there rest on one batch in
which each request asks for something else, once. A runner that is not named was not tested, which does not mean that it
fails; a known fault is in the note. One named for 0.32 alone has not been run with 0.33 yet. What is drafted is held to
the paper's equations too, in every engine of these tests but those of data parallel: each draft token, and each
distribution that drafts are drawn from, given the text verified before it (the first 400 drafts of an engine;
[draft_check](../tests/support/draft_check.py)). For targets in FP8, NVFP4 and MXFP4, whose kernels are for GPUs, the
engine's config is made ([engine_configs](../tests/request/test_engine_configs.py)), and no engine. `python
tests/support/feature_list.py` writes this page from the tests' marks and that record, and
`tests/house/test_feature_matrix.py` holds it to them.

| feature | state | 0.32 | 0.33 | proven by | note |
|---|---|---|---|---|---|
"""


def marks(drafter: str = "gumiho") -> dict[str, dict[str, set[str]]]:
    """Test files by feature and model runner, from the decorators of every test function.

    A third argument of the mark names the drafter where it is not Gumiho.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.feature":
                    name, runner, *other = (ast.literal_eval(argument) for argument in decorator.args)
                    if drafter != (other or ["gumiho"])[0]:
                        continue
                    found.setdefault(name, {}).setdefault(runner, set()).add(file.relative_to(TESTS).as_posix())
    return found


def proven_with_next(drafter: str = "gumiho") -> dict[str, dict[str, set[str]]]:
    """As `marks`, those files alone whose tests of the row all passed with vLLM's next release."""
    found: dict[str, dict[str, set[str]]] = {}
    marked = marks(drafter)
    for file, entry in json.loads(RECORD.read_text())["files"].items():
        name = file.removeprefix("tests/")
        for feature, runner, *other in entry["proven"]:
            if drafter == (other or ["gumiho"])[0] and name in marked.get(feature, {}).get(runner, ()):
                found.setdefault(feature, {}).setdefault(runner, set()).add(name)
    return found


def totals() -> dict[str, int | str]:
    """Tests that passed, failed and were skipped with vLLM's next release, and when."""
    record = json.loads(RECORD.read_text())
    files = record["files"].values()
    return {
        "passed": sum(entry["passed"] for entry in files),
        "failed": sum(len(entry["failed"]) for entry in files),
        "skipped": sum(sum(entry["skipped"].values()) for entry in files),
        "date": record["date"],
    }


MOA = """
## Mixture of Attentions

The same states, for drafts of `{"method": "moa"}`, which are held to the equations too. Each row has a
request or two; Gumiho's tests go deeper. A row that is missing here has no proof with this drafter yet.

| feature | state | 0.32 | 0.33 | proven by |
|---|---|---|---|---|
"""


def links(proofs: dict[str, set[str]]) -> str:
    """Of the tests of a row."""
    files = sorted({file for files in proofs.values() for file in files})
    return ", ".join(f"[{Path(file).stem.removeprefix('test_')}](../tests/{file})" for file in files)


def cells(name: str, *found: dict[str, dict[str, set[str]]]) -> str:
    """The model runners in which a row holds, a cell for each release."""
    return " | ".join(", ".join(runner for runner in RUNNERS if runner in of.get(name, {})) for of in found)


LAYERED = """
## Gumiho that reads several layers

The same states, for [heads whose first step reads several of the target's layers](training.md#several-layers).
A row that is missing here has no proof with this drafter yet.

| feature | state | 0.32 | 0.33 | proven by |
|---|---|---|---|---|
"""


def table(drafter: str, head: str) -> str:
    """Rows of another drafter than Gumiho."""
    marked, following = marks(drafter), proven_with_next(drafter)
    lines = [
        f"| {name} | {FEATURES[name][0]} | {cells(name, marked, following)} | {links(marked[name])} |"
        for name in FEATURES
        if name in marked
    ]
    return head + "\n".join(lines) + "\n"


def page() -> str:
    """docs/features.md as it must be: a note of more than LONGEST words stands below the table, numbered."""
    marked, following, lines, notes = marks(), proven_with_next(), [], []
    for name, (state, note) in FEATURES.items():
        proofs = marked.get(name, {})
        if len(note.split()) > LONGEST:
            notes.append(f"{len(notes) + 1}. {name}: {note}")
            note = f"note {len(notes)}"
        lines.append(f"| {name} | {state} | {cells(name, marked, following)} | {links(proofs)} | {note} |")
    return (
        HEAD.format(**totals())
        + "\n".join([*lines, "", *notes])
        + "\n"
        + table("gumiho-layers", LAYERED)
        + table("moa", MOA)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
