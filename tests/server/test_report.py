"""The table at start: where memory goes, on a CPU and on a GPU."""

import httpx
import msgspec

from nsa_http.report import describe_engine
from nsa_serve.messages import CacheComponent, DeviceMemory
from tests.server.fake_engine import FakeEngine, make_app

MEMORY = DeviceMemory(
    name="NVIDIA H200",
    total_bytes=139 * 2**30,
    other_bytes=2**29,
    weight_bytes=17 * 2**30,
    activation_bytes=3 * 2**30,
    graph_bytes=2**28,
    num_graphs=77,
    capture_s=4.5,
)


def test_a_cpu_has_weights_and_pages(engine: FakeEngine) -> None:
    lines = describe_engine(engine.info)
    assert lines[0] == "model     native, 1.2 M parameters, float32 on cpu"
    assert [line.split()[0] for line in lines] == [
        *("model", "weights", "cache", "raw", "compressed", "fits", "start")
    ]
    assert lines[2].endswith("70 pages of 16 tokens = 1,120 tokens")


def test_a_gpu_has_activations_and_graphs_too(engine: FakeEngine) -> None:
    info = msgspec.structs.replace(
        engine.info, memory=MEMORY, cache_dtype="float8_e4m3fn", quantization="fp8"
    )
    lines = describe_engine(info)
    assert lines[0].endswith("float32 on NVIDIA H200")
    assert lines[1] == "weights   4.7 MiB, fp8"
    assert lines[2] == "step      3.00 GiB for activations and buffers"
    assert lines[3] == "graphs    256.0 MiB: 77 CUDA graphs, captured in 4.50 s"
    assert lines[4].startswith("other     512.0 MiB of the GPU's 139.00 GiB")
    assert lines[5].endswith("1,120 tokens, float8_e4m3fn")
    without = msgspec.structs.replace(MEMORY, num_graphs=0, graph_bytes=0)
    lines = describe_engine(msgspec.structs.replace(info, memory=without))
    assert not any(line.startswith("graphs") for line in lines)


def test_window_pages_have_lines_of_their_own(engine: FakeEngine) -> None:
    window = CacheComponent("window", 512.0, 8_192, max_tokens=160)
    info = msgspec.structs.replace(
        engine.info, num_swa_pages=1234, cache=[*engine.info.cache, window]
    )
    lines = describe_engine(info)
    assert lines[2].endswith("70 pages of 16 tokens = 1,120 tokens, 1,234 window pages")
    assert lines[5].split()[:2] == ["window", "512"]
    assert lines[5].endswith("8.0 KiB, at most 160 tokens of a sequence")


async def test_server_info_has_the_parts(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(engine.info, memory=MEMORY)
    transport = httpx.ASGITransport(app=make_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        info = (await client.get("/server_info")).json()
    assert info["memory"] == msgspec.to_builtins(MEMORY)
