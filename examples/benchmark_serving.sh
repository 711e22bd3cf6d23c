#!/bin/sh
# Shows: vLLM's own serving benchmark without and with Gumiho, and the comparison.
#
#     sh examples/benchmark_serving.sh
#
# TARGET, K, CONCURRENCY, NUM_PROMPTS, OUTPUT_LEN, PORT and ENGINE_ARGS may be set. `vllm-gumiho bench` runs such
# pairs for many methods, K and loads, several times over.
set -eu
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
TARGET=${TARGET:-models/SmolLM2-135M-Instruct}
K=${K:-3} CONCURRENCY=${CONCURRENCY:-2} NUM_PROMPTS=${NUM_PROMPTS:-8} OUTPUT_LEN=${OUTPUT_LEN:-32} PORT=${PORT:-8000}
ENGINE_ARGS=${ENGINE_ARGS---dtype float32 --enforce-eager --max-model-len 1024}
OUT=${OUT:-out/benchmark_serving}
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_NO_USAGE_STATS=1
mkdir -p "$OUT"
python - "$OUT/prompts.jsonl" <<'PYTHON'
import json, sys
with open("examples/prompts.jsonl") as prompts, open(sys.argv[1], "w") as out:
    for line in prompts:
        out.write(json.dumps({"prompt": json.loads(line)["turns"][0]}) + "\n")
PYTHON

server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null' EXIT INT TERM

measure() { # name, arguments of vllm serve
    name=$1
    shift
    # shellcheck disable=SC2086
    vllm serve "$TARGET" --port "$PORT" --no-enable-prefix-caching $ENGINE_ARGS "$@" >"$OUT/$name.log" 2>&1 &
    server=$!
    until python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$PORT/health')" 2>/dev/null; do
        kill -0 "$server" 2>/dev/null || { tail -5 "$OUT/$name.log" >&2; echo "$name: the server ended" >&2; exit 1; }
        sleep 1
    done
    vllm bench serve --model "$TARGET" --port "$PORT" --dataset-name custom --dataset-path "$OUT/prompts.jsonl" \
        --disable-shuffle --num-prompts "$NUM_PROMPTS" --output-len "$OUTPUT_LEN" --max-concurrency "$CONCURRENCY" \
        --temperature 0 --num-warmups 1 --save-result --result-dir "$OUT" --result-filename "$name.json"
    kill "$server"
    wait "$server" || true
    server=
}

measure off
measure gumiho --speculative-config "{\"method\": \"gumiho\", \"num_speculative_tokens\": $K}"

python - "$OUT" <<'PYTHON'
import json, pathlib, sys
off, on = (json.loads(pathlib.Path(sys.argv[1], f"{name}.json").read_text()) for name in ("off", "gumiho"))
print(f"output tokens/s: {off['output_throughput']:.2f} without, {on['output_throughput']:.2f} with Gumiho")
print(f"speedup {on['output_throughput'] / off['output_throughput']:.2f}x, one run each: repeat before you believe it")
print(f"acceptance length {on['spec_decode_acceptance_length']:.2f}")
PYTHON
