"""The Triton kernels beside plain PyTorch on the device that is to train."""

import attention
import torch

from nsa_kernels.spec import NSASpec


def check_kernels(device: torch.device) -> None:
    """Compare the Triton kernels with the plain way on this device. Raises SystemExit."""
    spec, generator = NSASpec(num_selected_blocks=4, window_size=100), torch.Generator(device)
    generator.manual_seed(0)
    q, k, v, weight = (
        torch.randn(2, 523, heads, 64, device=device, generator=generator).bfloat16()
        for heads in (9, 3, 3, 9)
    )
    k_cmp, v_cmp = (attention.compress_mean(x, spec) for x in (k, v))
    rule = attention.Rule("cmp", spec)
    _, lse = attention.attend(q, k_cmp, v_cmp, rule, scale=0.125, backend="plain")
    selected = attention.select(q, k_cmp, lse, spec, scale=0.125, backend="plain")
    by_kernel = attention.select(q, k_cmp, lse, spec, scale=0.125, backend="triton")
    problems = []
    if (selected != by_kernel).float().mean() > 0.01:
        problems.append("selection")
    rules = (rule, attention.Rule("slc", spec, selected), attention.Rule("swa", spec))
    for rule in rules:
        inputs = [q, k_cmp, v_cmp] if rule.branch == "cmp" else [q, k, v]
        results = []
        backends: tuple[attention.Backend, ...] = ("plain", "triton")
        for backend in backends:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            queries, keys, values = leaves
            o, _ = attention.attend(queries, keys, values, rule, scale=0.125, backend=backend)
            results.append((o.detach(), *torch.autograd.grad(o, leaves, weight)))
        for name, want, got in zip(("o", "dq", "dk", "dv"), *results, strict=True):
            error = (got.float() - want.float()).norm() / want.float().norm()
            if not error < 0.03:  # also where it is NaN
                problems.append(f"{name} of {rule.branch} ({float(error):.3f})")
    if problems:
        raise SystemExit(
            f"the Triton kernels differ from plain PyTorch on this device: {', '.join(problems)}; "
            "use --attention plain"
        )
