"""The only room that patches vLLM: the table of its internals, and what is done to them."""
