"""What a GPU does and a CPU does not, for engines of tests: a drafting fault that only a GPU would show shows here too.

`operators`: in place and strict about shapes.  `sleep`: memory given away and got back.  `traced`: the draft pass as
vLLM's compiler takes it.  `replay`: a captured function, of which a CUDA graph keeps tensor operations alone.
`adaptive`: verification trimmed by confidence, which vLLM offers with CUDA graphs only.
"""
