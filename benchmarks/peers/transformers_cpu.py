"""Transformers' Llama on the exported weights: `transformers_cpu.py MODEL_FOLDER WORKLOAD THREADS`.

It prints one line of JSON that begins with "versions".
"""

import json
import sys
import time

import torch
import transformers
from measure import measure, read_workload


class FirstToken(transformers.LogitsProcessor):
    """Notes when the first logits are there; leaves them alone."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return scores


def main() -> None:
    folder, workload_path, num_threads = sys.argv[1:4]
    torch.set_num_threads(int(num_threads))
    start = time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - start

    @torch.inference_mode()
    def run(prompts: list[list[int]], output_len: int) -> list[tuple[float, float]]:
        ids = torch.tensor(prompts)
        clock = FirstToken()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([clock]),
        )
        total_s = time.perf_counter() - start
        return [(clock.first - start, total_s)] * len(prompts)

    results = measure(read_workload(workload_path), run)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "load_s": load_s, "scenarios": results}))


if __name__ == "__main__":
    main()
