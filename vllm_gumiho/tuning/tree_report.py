"""``vllm-gumiho plan --trees``: what it is given, its tables and its picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_gumiho.errors import TuningError
from vllm_gumiho.tuning import inputs
from vllm_gumiho.tuning.trees import BATCHES, NODES, Choice, Times, choices, fastest, ranked_like, verdict

console = Console()


def plan_trees(
    step_times: str,
    report: Path | None,
    acceptance: str | None,
    extra: float,
    serial_steps: int,
    concurrency: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Tables of chains and trees at each batch size, and the verdict; JSON instead, and a picture, where asked for.

    Raises: TuningError.
    """
    if report is None:
        raise TuningError("--trees needs --from REPORT, an eval report made with --rank-hits")
    rates = inputs.rank_hits(report)
    if acceptance is not None:
        rates = ranked_like(inputs.numbers(acceptance, "--acceptance"), rates)
    times = pass_times(step_times, extra)
    batches = BATCHES if concurrency is None else (concurrency,)
    found = choices(rates, times, batches, NODES, serial_steps)
    if plot is not None:
        plot_trees(found, plot)
    if as_json:
        rows = [{"nodes": one.tree.nodes, **dataclasses.asdict(one)} for one in found]
        print(json.dumps({"verdict": verdict(found), "rates": rates, "choices": rows}, indent=1))
        return
    _show(found)
    console.print(verdict(found), highlight=False, soft_wrap=True)


def pass_times(given: str, extra: float) -> Times:
    """Four numbers as of `inputs.step_times`, or a JSON file ``{"pass": [[rows, ms], ...], "serial", "heads"}``."""
    path = Path(given)
    content = json.loads(path.read_bytes()) if path.is_file() else None
    if isinstance(content, dict) and "pass" in content:
        try:
            points = tuple((float(rows), float(ms)) for rows, ms in content["pass"])
            return Times(points, content["serial"], content["heads"], extra)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, TuningError):
                raise
            raise TuningError(
                f'{path}: expected {{"pass": [[rows, ms], ...], "serial": ms, "heads": ms}} ({error!r})'
            ) from error
    four = inputs.step_times(given)
    return Times(((1, four.target), (2, four.target + four.verify)), four.serial, four.heads, extra)


def _show(found: Sequence[Choice]) -> None:
    """A row a tree, a column a batch size; lengths are those at the first one."""
    batches = list(dict.fromkeys(one.batch for one in found))
    at = {batch: {(one.tree.chain, one.tree.nodes): one for one in found if one.batch == batch} for batch in batches}
    names = [f"batch {batch}" for batch in batches]
    table = Table("draft", "spine", "length", *names, title="expected tokens/s over the best chain")
    for chain, nodes in at[batches[0]]:
        tree = at[batches[0]][chain, nodes].tree
        cells = []
        for batch in batches:
            ratio = at[batch][chain, nodes].tokens_per_s / fastest(found, batch, True).tokens_per_s
            cells.append(f"{ratio:.2f}x")
        kind = "off" if not nodes else f"chain {nodes}" if chain else f"tree {nodes}"
        table.add_row(kind, str(tree.depth), f"{1 + tree.accepted:.3f}", *cells)
    console.print(table)


def plot_trees(found: Sequence[Choice], output: Path) -> None:
    """Acceptance length against nodes, and tokens/s over the best chain, a line a batch size.

    Raises: FigureError without matplotlib, or when the file cannot be written.
    """
    from vllm_gumiho.figures import MARKERS, new_figure, save_figure

    figure = new_figure()
    left, right = figure.subplots(1, 2)
    batches = list(dict.fromkeys(one.batch for one in found))
    first = [one for one in found if one.batch == batches[0] and one.tree.nodes]
    for label, chain in (("chain", True), ("caterpillar", False)):
        line = [one.tree for one in first if one.tree.chain == chain]
        left.plot([tree.nodes for tree in line], [1 + tree.accepted for tree in line], marker="o", label=label)
    for index, batch in enumerate(batches):
        base = fastest(found, batch, True).tokens_per_s
        trees = [one for one in found if one.batch == batch and not one.tree.chain]
        nodes, ratios = [one.tree.nodes for one in trees], [one.tokens_per_s / base for one in trees]
        right.plot(nodes, ratios, marker=MARKERS[index % len(MARKERS)], label=f"batch {batch}")
    right.axhline(1.0, color="black", linestyle="--", label="best chain")
    left.set(xlabel="draft tokens a step", ylabel="expected acceptance length")
    right.set(xlabel="nodes of the tree", ylabel="expected tokens/s over the best chain")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save_figure(figure, output)
