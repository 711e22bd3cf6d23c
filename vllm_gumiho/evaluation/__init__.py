"""The judge: what a drafter's drafts are worth, measured on the real vLLM engine over sets of prompts."""


class EvalError(ValueError):
    """A judgement that cannot be made.  The message names the input, the reason and the remedy."""
