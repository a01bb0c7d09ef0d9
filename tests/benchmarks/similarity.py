"""All pairs of 256 x 256 images at 64 px grey: against scikit-image's loop, batches of pytorch-msssim, the machine.

The others are timed on a part of the pairs, since each of theirs costs the same. The difference shown is that to
scikit-image; pytorch-msssim computes in float32 alone and is off by up to 6e-5.
The limit is the time of the cross terms alone, 121 multiply-adds for each pair and window position, at the rate
of torch's own large matrix product in the same run: no exact method that forms each window's covariance as a
product of windows can take less.
"""

from collections.abc import Iterator

import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from tasks.similarity.ssim import TAPS, pairwise_ssim
from tests.benchmarks.measuring import Call, Plan, Row, at_least, peak_mib

IMAGES, SIDE, LOOPED, BATCHED = 256, 64, 128, 4096


def rows(plan: Plan) -> Iterator[Row]:
    """Microseconds for each pair."""
    a, b = (images.to(plan.device) for images in crops())
    ours = pairwise_ssim(a, b, memory_mb=_memory(plan))
    assert torch.allclose(ours[: BATCHED // IMAGES], _batched(a, b), atol=1e-3), "all compute the same"
    off = (ours[0, :LOOPED].cpu() - _looped(a, b)).abs().max().item()
    best = plan.race(
        {
            "ours": lambda: pairwise_ssim(a, b, memory_mb=_memory(plan)),
            "skimage": lambda: _looped(a, b),
            "msssim": lambda: _batched(a, b),
            "matmul": _matmul(plan.device),
        }
    )
    pair = {"ours": best["ours"] / IMAGES**2, "skimage": best["skimage"] / LOOPED}
    pair["msssim"] = best["msssim"] / BATCHED
    limit = TAPS**2 * (SIDE - TAPS + 1) ** 2 * best["matmul"] / _MATMUL**3
    name = f"pairwise SSIM, {IMAGES} x {IMAGES} at {SIDE} px grey"
    yield Row(name, f"{pair['ours'] * 1e6:.2f} us a pair", f"differs by {off:.0e}", "<= 1e-5", off <= 1e-5)
    loop = f"{pair['skimage'] * 1e6:.0f} us a pair"
    yield at_least("- scikit-image's loop", loop, pair["skimage"] / pair["ours"], 30)
    batched = f"{pair['msssim'] * 1e6:.0f} us a pair"
    yield at_least("- pytorch-msssim, 256 pairs at once", batched, pair["msssim"] / pair["ours"], 5)
    rate = _MATMUL**3 / best["matmul"] / 1e9
    share = f"{100 * limit / pair['ours']:.0f} % of the limit"
    yield Row(f"- limit: cross terms at {rate:.0f} G multiply-adds/s", f"{limit * 1e6:.2f} us a pair", share)
    if plan.device.type == "cpu":
        for setting in (32, 256):
            needed = peak_mib(_all_pairs, setting)
            yield Row(f"- peak memory, memory_mb={setting}", f"{needed:.0f} MiB", "", f"<= {setting} MiB",
                      needed <= setting)  # fmt: skip


def crops() -> tuple[Tensor, Tensor]:
    """Two sets of crops of a photograph, [256, 1, 64, 64] in [0, 1]."""
    camera = torch.tensor(data.camera() / 255.0, dtype=torch.float32)
    corners = [(37 * i % (500 - SIDE), 53 * i % (500 - SIDE)) for i in range(2 * IMAGES)]
    images = torch.stack([camera[r : r + SIDE, c : c + SIDE] for r, c in corners])[:, None]
    return images[:IMAGES], images[IMAGES:]


def _memory(plan: Plan) -> int:
    return 256 if plan.device.type == "cpu" else 4096


def _looped(a: Tensor, b: Tensor) -> Tensor:
    x = a[0, 0].cpu().double().numpy()
    others = b[:LOOPED, 0].cpu().double().numpy()
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return torch.tensor([structural_similarity(x, y, **settings) for y in others])


@torch.no_grad()
def _batched(a: Tensor, b: Tensor) -> Tensor:
    from pytorch_msssim import ssim

    n = BATCHED // IMAGES
    found = [ssim(x.expand_as(b), b, data_range=1.0, size_average=False) for x in a[:n].split(1)]
    return torch.stack(found)


_MATMUL = 1024


def _matmul(device: torch.device) -> Call:
    x, y = torch.rand(_MATMUL, _MATMUL, device=device), torch.rand(_MATMUL, _MATMUL, device=device)
    return lambda: torch.mm(x, y)


def _all_pairs(memory_mb: int) -> Call:
    a, b = crops()
    return lambda: pairwise_ssim(a, b, memory_mb=memory_mb)
