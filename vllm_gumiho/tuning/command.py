"""The commands ``vllm-gumiho plan`` and ``vllm-gumiho tune``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_gumiho.errors import TuningError
from vllm_gumiho.files import write_json
from vllm_gumiho.options import CONCURRENCY, CheckpointOption, JsonFlag, TargetOption
from vllm_gumiho.request.lengths import SCHEDULE
from vllm_gumiho.tuning.schedule import in_words
from vllm_gumiho.tuning.settings import Plan
from vllm_gumiho.tuning.theory import Option, StepTimes, best, options

console = Console()


def plan(
    step_times: Annotated[
        str,
        typer.Option(
            help="Milliseconds: target pass over one token, each further token in it, a serial step, all heads; "
            "four numbers with commas, or a JSON file with keys target, verify, serial, heads; for trees also one with "
            "pass, a list of [rows, ms], serial and heads."
        ),
    ],
    acceptance: Annotated[
        str | None, typer.Option(help="Accuracy at position 1, 2, ..., given that all before were right.")
    ] = None,
    serial_acceptance: Annotated[str | None, typer.Option(help="The same for tokens of serial steps.")] = None,
    head_acceptance: Annotated[str | None, typer.Option(help="The same for tokens of heads.")] = None,
    report: Annotated[
        Path | None, typer.Option("--from", help="Take accuracies from a JSON report of eval or tune.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help=f"{CONCURRENCY} Default: 1; of trees 1, 2, 4, 8, 16.")] = None,
    serial_steps: Annotated[
        int | None, typer.Option(help="Only splits of a drafter trained with so many serial steps.")
    ] = None,
    trees: Annotated[
        bool,
        typer.Option(
            "--trees",
            help="Instead: caterpillar trees of 4 to 64 nodes against chains, by batch size, from an eval report with "
            "rank hits. With --acceptance, a drafter whose misses are ranked as the report's.",
        ),
    ] = False,
    tree_extra: Annotated[
        float, typer.Option(help="Milliseconds of a tree beside its rows: top-k, mask, moving the KV cache.")
    ] = 0.0,
    weights_of: Annotated[
        str | None,
        typer.Option(
            help="Gumiho checkpoint: also the best split with each draft_weights, by the bytes that it reads.  "
            "The step times are then those of bf16, and accuracies are taken to be the same."
        ),
    ] = None,
    as_json: JsonFlag = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
) -> None:
    """Expected accepted tokens and tokens/s of every split of K into serial steps and heads.

    With one list of accuracies a head is taken to guess as well as a serial step at the same position, which favours
    heads: real ones are worse.  Give both lists where you know them.  Serial steps and heads are taken to cost the
    same at any batch size.
    """
    from vllm_gumiho.tuning import inputs

    if trees:
        from vllm_gumiho.tuning.tree_report import plan_trees

        steps = 2 if serial_steps is None else serial_steps
        plan_trees(step_times, report, acceptance, tree_extra, steps, concurrency, as_json, plot)
        return
    concurrency = 1 if concurrency is None else concurrency
    times = inputs.step_times(step_times)
    serial, heads = _accuracies(acceptance, serial_acceptance, head_acceptance, report)
    found = options(serial, heads, times, concurrency, serial_steps)
    fastest = best(found)
    if plot is not None:
        from vllm_gumiho.tuning.plot import plot_plan

        plot_plan(found, plot)
    by_weights = _by_weights(weights_of, times, lambda t: best(options(serial, heads, t, concurrency, serial_steps)))
    if as_json:
        rows = [{"length": option.length, **dataclasses.asdict(option)} for option in found]
        more = {"draft_weights": by_weights} if by_weights else {}
        print(json.dumps({"batch": concurrency, "best": rows[found.index(fastest)], "options": rows, **more}, indent=1))
        return
    table = Table(
        "K",
        "serial",
        "heads",
        "accepted",
        "step ms",
        "tokens/s",
        "speedup",
        "",
        title=f"{concurrency} requests at once",
    )
    for length in range(found[-1].length + 1):
        here = [option for option in found if option.length == length]
        for option in here:
            mark = "[green]best" if option is fastest else "*" if length and option is best(here) else ""
            table.add_row(
                str(length),
                str(option.serial),
                str(option.heads),
                f"{option.accepted:.3f}",
                f"{option.step_ms:.2f}",
                f"{option.tokens_per_s:.1f}",
                f"{option.speedup:.2f}x",
                mark,
            )
    console.print(table)
    console.print("* fastest split of its K; tokens a step are 1 + accepted", highlight=False)
    console.print(_in_words(found, fastest), highlight=False, soft_wrap=True)
    if by_weights:
        table = Table("draft_weights", "MB a round", "K", "step ms", "tokens/s", title="best split, by bytes read")
        for kind, row in by_weights.items():
            numbers = (f"{row['megabytes']:.1f}", str(row["length"]), f"{row['step_ms']:.2f}")
            table.add_row(kind, *numbers, f"{row['tokens_per_s']:.1f}")
        console.print(table)


def _by_weights(
    checkpoint: str | None, times: StepTimes, fastest: Callable[[StepTimes], Option]
) -> dict[str, dict[str, float]]:
    """By ``draft_weights``: megabytes that a full round reads, and the best split with these."""
    if checkpoint is None:
        return {}
    from vllm_gumiho.request.round_bytes import of_checkpoint

    read = of_checkpoint(checkpoint)
    wide, found = read["bf16"], {}
    for kind, one in read.items():
        option = fastest(times.at(one.serial / wide.serial, one.heads / wide.heads))
        kept = {name: getattr(option, name) for name in ("length", "serial", "heads", "step_ms", "tokens_per_s")}
        found[kind] = {"megabytes": one.total / 1e6, **kept}
    return found


def tune(
    target: TargetOption,
    checkpoint: CheckpointOption = "gumiho",
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Most requests at once; nothing is drafted above it.  Give --max-num-seqs of the server where that is "
            "smaller than the default: 16 on a CPU, 64 elsewhere."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the record, with all times, to this file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="vLLM's, as you serve.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="vLLM's, as you serve.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="vLLM's, as you serve.")] = False,
    tensor_parallel_size: Annotated[int, typer.Option(help="vLLM's, as you serve.")] = 1,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="vLLM's, as you serve.")] = None,
    draft_weights: Annotated[
        str | None, typer.Option(help="auto, bf16, fp8 or int8, as you serve; a schedule is stored for one of them.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Times each cell is measured.")] = Plan.repeats,
    seconds: Annotated[float, typer.Option(help="Of decoding, for each cell and repeat.")] = Plan.seconds,
    tokens: Annotated[int, typer.Option(help="Length of each answer that acceptance is measured on.")] = Plan.tokens,
    margin: Annotated[float, typer.Option(help="Gain over not drafting that turns drafting on.")] = Plan.margin,
    max_loss: Annotated[
        float, typer.Option(help="Loss at any number of requests that turns it off altogether.")
    ] = Plan.max_loss,
    verify: Annotated[
        bool,
        typer.Option(
            help="Then measure real requests, without speculation and with the schedule, and take a schedule back that "
            "loses more than --max-loss or on average."
        ),
    ] = True,
    verify_tokens: Annotated[int, typer.Option(help="Mean length of the answers that verify.")] = Plan.answer_tokens,
    rounds: Annotated[int, typer.Option(help="Rounds of them.")] = Plan.rounds,
    curve: Annotated[Path | None, typer.Option(help="PNG of the verification, with the largest K beside.")] = None,
) -> None:
    """Measure step times and acceptance on this machine, and store the schedule that "auto" uses.

    Starts real engines in processes of their own, with speculation off and at every K.  The engine arguments are
    part of what a schedule is stored for: give those you serve with.
    """
    from vllm.platforms import current_platform

    from vllm_gumiho.engines.target import find_target
    from vllm_gumiho.request import resolve
    from vllm_gumiho.tuning import auto, storage

    sizes = {
        "concurrency": concurrency,
        "repeats": repeats,
        "tokens": tokens,
        "verify_tokens": verify_tokens,
        "rounds": rounds,
        "seconds": seconds,
    }
    for name, value in sizes.items():
        if value is not None and value <= 0:
            raise TuningError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if curve is not None and not verify:
        raise TuningError("--curve shows what verification measures; leave --no-verify out")
    storage.writable_folder()
    current_platform.pre_register_and_update()
    given = {"quantization": quantization, "gpu_memory_utilization": gpu_memory_utilization}
    engine, model = _engine_of(
        find_target(target),
        dtype=dtype,
        enforce_eager=enforce_eager,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=concurrency,
        **{name: value for name, value in given.items() if value is not None},
    )
    request = resolve({"model": checkpoint, "draft_weights": draft_weights}, model)
    key = storage.identity(request, engine, model)
    settings = Plan(
        max_batch=concurrency or storage.largest_batch(engine),
        repeats=repeats,
        seconds=seconds,
        tokens=tokens,
        margin=margin,
        max_loss=max_loss,
        rounds=rounds if verify else 0,
        answer_tokens=verify_tokens,
        fixed=curve is not None,
    )
    with console.status("starting") as status:
        record = auto.measured_record(
            request, engine, model, key, settings, lambda line: status.update(f"measuring: {line}")
        )
        file = storage.save(record)
    _show(record)
    console.print(f"stored: {file}", highlight=False, soft_wrap=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, _portable(record))
    if curve is not None:
        from vllm_gumiho.tuning.plot import plot_curve

        plot_curve(record["verified"], f"{Path(target).name}, {key['processor']}, {key['dtype']}", curve)


def _engine_of(target: str, **arguments: Any) -> tuple[Any, Any]:
    """vLLM's engine arguments and the target's config.  Raises: TuningError with vLLM's reason."""
    from vllm.engine.arg_utils import EngineArgs

    engine = EngineArgs(model=target, **arguments)
    try:
        return engine, engine.create_model_config()
    except (ValueError, OSError) as error:
        words = " ".join(str(error).partition("[type=")[0].split())
        reason = words.partition("Value error, ")[2] or words
        raise TuningError(
            f"{target}: vLLM cannot use it as a target ({reason}); give a model folder or hub name"
        ) from error


def _portable(record: dict[str, Any]) -> dict[str, Any]:
    """The record with models named by their last part alone: where they lie on this machine is nobody else's matter."""
    named = {name: {**record["key"][name], "name": Path(record["key"][name]["name"]).name} for name in _MODELS}
    return {**record, "key": {**record["key"], **named}}


_MODELS = ("target", "checkpoint")


def _show(record: dict[str, Any]) -> None:
    lengths = list(record["expected"][0]["tokens_per_s"])
    table = Table(
        "batch", "off", *(f"K={k}" for k in lengths), title="expected tokens/s without speculation, and speed over it"
    )
    for row in record["expected"]:
        off = row["off_tokens_per_s"]
        cells = [f"{speed / off:.2f}" for speed in row["tokens_per_s"].values()]
        table.add_row(str(row["batch"]), f"{off:.1f}", *cells)
    console.print(table)
    accepted = " ".join(f"{p:.2f}" for p in record["acceptance"])
    console.print(f"accepted, given that all before were: {accepted}", highlight=False)
    if record["schedule"] is None:
        console.print(f"speculation off: {record['reason']}", highlight=False)
    else:
        console.print(f"schedule: {in_words(record['schedule'])}; {record['reason']}", highlight=False)
        console.print_json(data={SCHEDULE: record["schedule"]}, indent=None)
        if record["above"]:
            largest = record["schedule"][-1][0] - 1
            console.print(f"off where --max-num-seqs is above {largest}: {record['above']}", highlight=False)
    if "verified" in record:
        from vllm_gumiho.tuning.verify import gains_of

        verified = record["verified"]
        table = Table("requests at once", *verified, title="measured tokens/s (and over off)")
        gains = {name: gains_of(verified, name) for name in verified}
        for size in verified["off"]:
            speeds = {name: statistics.median(line[size]) for name, line in verified.items()}
            table.add_row(size, *(f"{speed:.1f} ({gains[name][int(size)]:.2f}x)" for name, speed in speeds.items()))
        console.print(table)


def _accuracies(
    both: str | None, serial: str | None, heads: str | None, report: Path | None
) -> tuple[list[float], list[float]]:
    from vllm_gumiho.tuning import inputs

    if sum((both is not None, report is not None, serial is not None or heads is not None)) != 1:
        raise TuningError(
            "accuracies: give one of --acceptance, --from, or --serial-acceptance and --head-acceptance together"
        )
    if report is not None:
        found = inputs.accuracies(report)
        return found, found
    if both is not None:
        found = inputs.numbers(both, "--acceptance")
        return found, found
    return (
        inputs.numbers(serial, "--serial-acceptance") if serial is not None else [],
        inputs.numbers(heads, "--head-acceptance") if heads is not None else [],
    )


def _in_words(found: Sequence[Option], fastest: Option) -> str:
    if fastest is found[0]:
        return f"Do not draft: the best draft gives {max(option.speedup for option in found[1:]):.2f}x."
    worth = " ".join(f"{value / 100:.3f}" for value in fastest.sensitivity)
    return (
        f"Best: K={fastest.length}, {fastest.serial} serial and {fastest.heads} from heads, {fastest.speedup:.2f}x.\n"
        f"Accepted tokens that 0.01 more accuracy adds, by position: {worth}"
    )
