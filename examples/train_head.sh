#!/bin/sh
# Shows: a Gumiho head for a model of your own, from nothing: its answers, training on them, the judgement, the switch.
#
#     sh examples/train_head.sh
#
# The defaults are the smallest that go through all steps; the head they give is no good. For a real one set TARGET to
# your chat model, PROMPTS to some ten thousand prompts (JSON lines of {"id", "turns"}), TOKENS=256 and STEPS=20000,
# on a GPU; keep the prompts you judge on (EVALUATION, a folder) out of PROMPTS, as below.
set -eu
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
TARGET=${TARGET:-smollm2} PROMPTS=${PROMPTS:-} EVALUATION=${EVALUATION:-} OUT=${OUT:-out/my-head}
TOKENS=${TOKENS:-16} STEPS=${STEPS:-4} ROW_LENGTH=${ROW_LENGTH:-128} JUDGED=${JUDGED:-16}
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_NO_USAGE_STATS=1
if [ -z "$PROMPTS" ]; then
    mkdir -p "$OUT/judge"
    head -n 6 examples/prompts.jsonl >"$OUT/prompts.jsonl"
    tail -n 2 examples/prompts.jsonl >"$OUT/judge/judge.jsonl"
    PROMPTS=$OUT/prompts.jsonl EVALUATION=$OUT/judge
fi

vllm-gumiho generate --target "$TARGET" --prompts "$PROMPTS" --evaluation-prompts "$EVALUATION" \
    --max-tokens "$TOKENS" --output "$OUT/answers.jsonl"
vllm-gumiho train --target "$TARGET" --data "$OUT/answers.jsonl" --evaluation-prompts "$EVALUATION" \
    --steps "$STEPS" --save-every "$STEPS" --rows 1 --row-length "$ROW_LENGTH" --output "$OUT/head"
vllm-gumiho eval --target "$TARGET" --checkpoint "$OUT/head/final" --prompts "$EVALUATION" --max-tokens "$JUDGED" \
    --output "$OUT/judgement.json"
echo "turn it on: vllm serve TARGET --speculative-config '{\"method\": \"gumiho\", \"model\": \"$OUT/head/final\"}'"
