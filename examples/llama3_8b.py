"""Shows: the released head for Llama-3-8B-Instruct, drafting for the real target.

    python examples/llama3_8b.py

Needs a GPU of about 24 GiB and a Hugging Face account that may read the gated target; ends with code 3 and says what
is missing where there is none.
"""

import sys

TARGET, HEAD = "meta-llama/Meta-Llama-3-8B-Instruct", "amd/Gumiho-llama3-8b"


def missing() -> list[str]:
    import huggingface_hub
    import torch

    found = []
    if not torch.cuda.is_available():
        found.append("a GPU: PyTorch sees none")
    for name in (TARGET, HEAD):
        try:
            huggingface_hub.hf_hub_download(name, "tokenizer_config.json" if name == TARGET else ".gitattributes")
        except Exception as error:
            found.append(
                f"access to {name} on the Hugging Face hub ({type(error).__name__}): accept its licence there, run "
                "'hf auth login', and leave HF_HUB_OFFLINE unset"
            )
    return found


def main() -> None:
    if lacking := missing():
        print("llama3_8b.py cannot run here. It lacks", *lacking, sep="\n- ", file=sys.stderr)
        raise SystemExit(3)

    from vllm import LLM, SamplingParams

    llm = LLM(
        TARGET,
        speculative_config={"method": "gumiho", "num_speculative_tokens": 3},
        max_model_len=4096,
        disable_log_stats=False,
    )
    question = [{"role": "user", "content": "Explain speculative decoding in five sentences."}]
    (answer,) = llm.chat([question], SamplingParams(temperature=0, max_tokens=256))
    print(answer.outputs[0].text)
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            print(metric.name, getattr(metric, "values", None) or metric.value)


if __name__ == "__main__":
    main()
