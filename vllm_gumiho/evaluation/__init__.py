"""The judge: what a drafter's drafts are worth, measured on the real vLLM engine over sets of prompts."""
