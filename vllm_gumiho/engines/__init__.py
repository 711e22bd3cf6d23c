"""Real engines and servers in processes of their own, for every tool: one protocol, facts, counters, prompts."""
