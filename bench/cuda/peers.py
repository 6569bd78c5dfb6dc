#!/usr/bin/env python3
"""Times PyTorch's attention and matrix product on this card: the rows of ssmlib_cuda_bench that
have a peer in PyTorch, at the same shapes, in bf16, with random data. Needs torch with CUDA."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def time_of(run, repeats=9, batch_ms=20.0):
    def batch(n):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(n):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / n

    batch(3)
    n = max(1, min(1000, round(batch_ms / batch(2))))
    return statistics.median(batch(n) for _ in range(repeats))


def attention(d, length, backend, backward):
    heads, kv, tokens = 32, 8, 16384
    batch = tokens // length
    # Flash and cuDNN take grouped heads through enable_gqa.
    q = torch.randn(batch, heads, length, d, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
    k, v = (
        torch.randn(batch, kv, length, d, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(2)
    )
    dy = torch.randn(batch, heads, length, d, device="cuda", dtype=torch.bfloat16)

    def run():
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if backward:
            q.grad = k.grad = v.grad = None
            y.backward(dy)

    with sdpa_kernel(backend):
        return time_of(run)


def main():
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = time_of(lambda: a @ b)
    print(f"{'bf16 GEMM 8192^3':<56} {ms:9.4f}  {2 * 8192**3 / ms / 1e9:.0f} TFLOP/s")
    for d in (128, 64):
        for length in (2048, 16384):
            for backward in (False, True):
                for name, backend in (("flash-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
                    what = f"attention forward{' + backward' if backward else ''} D{d} T{length}"
                    try:
                        print(f"{what + ', ' + name:<56} {attention(d, length, backend, backward):9.4f}", flush=True)
                    except RuntimeError as error:
                        print(f"{what + ', ' + name:<56} {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
