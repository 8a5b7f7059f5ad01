"""Transformers' Llama on the exported weights: `transformers_cpu.py MODEL_FOLDER WORKLOAD THREADS`.

The last line of stdout is JSON.
"""

import json
import sys
import time

import torch
import transformers
from measure import measure, read_workload


def main() -> None:
    folder, workload_path, num_threads = sys.argv[1:4]
    torch.set_num_threads(int(num_threads))
    start = time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - start

    @torch.inference_mode()
    def wall(prompts: list[list[int]], output_len: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    results = measure(read_workload(workload_path), wall)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "load_s": load_s, "scenarios": results}))


if __name__ == "__main__":
    main()
