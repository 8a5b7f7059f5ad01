"""vLLM's CPU build on the exported weights: `vllm_cpu.py MODEL_FOLDER WORKLOAD THREADS`.

Run it with the Python of an environment that has vLLM. The last line of stdout is JSON.
"""

import json
import os
import sys
import time


def main() -> None:
    folder, workload_path, num_threads = sys.argv[1:4]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "3"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{int(num_threads) - 1}"
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    import vllm
    from measure import measure, read_workload

    llm = vllm.LLM(
        folder,
        dtype="bfloat16",
        max_model_len=8192,
        enable_prefix_caching=False,
        max_num_seqs=16,
        skip_tokenizer_init=False,
    )
    load_s = time.perf_counter() - start

    def wall(prompts: list[list[int]], output_len: int) -> float:
        params = vllm.SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    results = measure(read_workload(workload_path), wall)
    print(
        json.dumps({"versions": {"vllm": vllm.__version__}, "load_s": load_s, "scenarios": results})
    )


if __name__ == "__main__":
    main()
