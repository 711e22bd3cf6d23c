"""EAGLE-1 (arXiv 2401.15077), trained here for comparison and served by vLLM's own method ``eagle``."""
