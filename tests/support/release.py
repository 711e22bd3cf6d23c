"""The differences between the releases of vLLM that the tests run with; docs/results/vllm-0.33.md explains each."""

from vllm_gumiho.engines.facts import vllm_version

NEXT = not str(vllm_version()).startswith("0.32")
# A block of the prefix cache is known by the tokens that drafts read behind it too: one whose next token is another
# one is no hit with drafts.  Before, with drafts, the last block that was hit was always computed anew.
HASHES_LOOK_AHEAD = NEXT
