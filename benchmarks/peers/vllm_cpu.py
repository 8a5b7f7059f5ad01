"""vLLM's CPU build on the exported weights: `vllm_cpu.py MODEL_FOLDER WORKLOAD THREADS`.

Run it with the Python of an environment that has vLLM. It prints one line of JSON that begins with
"versions".
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
    )
    load_s = time.perf_counter() - start

    num_requests = 0

    def run(prompts: list[list[int]], output_len: int) -> list[tuple[float, float]]:
        nonlocal num_requests
        params = vllm.SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
        engine = llm.llm_engine
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        start = time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(num_requests), {"prompt_token_ids": prompt}, params)
            num_requests += 1
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter() - start
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
        return [(first[name], last[name]) for name in first]

    results = measure(read_workload(workload_path), run)
    print(
        json.dumps({"versions": {"vllm": vllm.__version__}, "load_s": load_s, "scenarios": results})
    )


if __name__ == "__main__":
    main()
