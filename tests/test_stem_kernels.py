"""The numbers of the stem's ops by GPU implementations, against float64: on a GPU, or emulated.

env $(python tests/emulation/build.py --env) pytest tests/test_stem_kernels.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stem_case import DTYPES, EPS, LAST, SIZES, as_multiplied, check, convolve, outputs, packed
from tolerances import assert_close_to_reference

from fusedres import kernels, plan
from fusedres.kernels.rows import VAR

pytestmark = pytest.mark.usefixtures("poisoned")
# images of the tests of a trained net: units of a byte
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


@pytest.fixture
def implementation(gpu_backend):
    return kernels.load({"emulated": "cuda", "interpreted": "triton"}.get(gpu_backend, gpu_backend))


class TestTraining:
    # several tiles across and down, of several images, for each block
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype, implementation, multiprocessors):
        multiprocessors(1)
        check(implementation, torch.randn(2, 3, 19, 36), 24, dtype, twice=dtype == torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_borders(self, size, dtype, implementation):
        check(implementation, torch.randn(2, 3, *size), 8, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_a_tail_of_filters(self, dtype, implementation):
        check(implementation, torch.randn(1, 3, 9, 12), 72, dtype)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "channels_last"])
    def test_layouts(self, layout, implementation):
        x = torch.randn(2, 3, 11, 14).to(torch.bfloat16).to(memory_format=layout)
        check(implementation, x, 16, torch.bfloat16, layout=layout, weight_dtype=torch.float32)

    def test_any_strides(self, implementation):
        x = torch.randn(14, 4, 2, 22).permute(2, 1, 0, 3)[:, 1:, :, ::2]
        check(implementation, x, 16, torch.float16)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_pixels(self, dtype, implementation, gpu_backend):
        """All of them, whichever tile has them, for filters of several tiles."""
        if gpu_backend == "interpreted":
            pytest.skip("the interpreter cuts bits off")
        x, weight = torch.randn(1, 3, 20, 33), torch.zeros(72, 3, 7, 7)
        pixels, y, _ = outputs(x, 72, dtype)
        implementation.stem_conv(x, weight, None, None, EPS, pixels, y, None)
        assert torch.equal(pixels, packed(x.to(dtype)))

    def test_float32_is_rounded_to_the_nearest(self, implementation, gpu_backend):
        """Image and weight have more bits than TF32; ``pixels`` keeps them."""
        if gpu_backend not in ("emulated", "cuda"):
            pytest.skip("Triton leaves them to the tensor cores, its interpreter multiplies all bits")
        x, weight = torch.randn(1, 3, 9, 10), torch.randn(8, 3, 7, 7) / 147**0.5
        pixels, y, _ = outputs(x, 8, torch.float32)
        implementation.stem_conv(x, weight, None, None, EPS, pixels, y, None)
        assert torch.equal(pixels, packed(x))
        near = convolve(as_multiplied(x).double(), as_multiplied(weight).double())
        torch.testing.assert_close(y.double(), near, rtol=1e-5, atol=1e-5)

    def test_no_statistics_and_a_weight_to_cast(self, implementation):
        x, weight = torch.randn(1, 3, 9, 10), torch.randn(8, 3, 7, 7) / 147**0.5
        pixels, y, _ = outputs(x, 8, torch.bfloat16)
        implementation.stem_conv(x, weight, None, None, EPS, pixels, y, None)
        x, weight = x.bfloat16(), weight.bfloat16()
        assert_close_to_reference(y, convolve(x, weight), convolve(x.double(), weight.double()))

    def test_a_mean_far_from_zero(self, implementation):
        """|mean| / std of the output of about 1e3: sums of squares would keep nothing of the variance."""
        x = torch.ones(2, 3, 15, 30) + 1e-3 * torch.randn(2, 3, 15, 30)
        weight = torch.zeros(8, 3, 7, 7)
        weight[:, :, 3, 3] = torch.rand(8, 3)  # the middle never meets the border
        pixels, y, stats = outputs(x, 8, torch.float32)
        implementation.stem_conv(x, weight, None, None, EPS, pixels, y, stats)
        var = y.double().var((0, 2, 3), correction=0)
        assert (y.double().mean((0, 2, 3)) / var.sqrt()).min() > 400
        torch.testing.assert_close(stats[VAR].double(), var, rtol=1e-4, atol=0)

    def test_what_is_not_finite_spreads_no_further_than_its_windows(self, implementation):
        """But to one output on its right, whose window begins with it (Triton's likewise)."""
        x, weight = torch.randn(1, 3, 20, 20), torch.randn(8, 3, 7, 7)
        x[0, 0, 9, 9], x[0, 1, 2, 3] = torch.nan, torch.inf
        pixels, y, _ = outputs(x, 8, torch.float16)
        implementation.stem_conv(x, weight, None, None, EPS, pixels, y, None)
        exact = convolve(x.half().double(), weight.half().double())
        finite = exact.isfinite()
        assert (~y.isfinite())[~finite].all()
        assert (y.isfinite() | (F.pad(~finite, (1, -1)))).logical_or(~finite).all()


class TestTrainedNet:
    def check(self, implementation, x, filters, dtype, *, pool=True, bias=True, mean=None, std=None):
        if "stem_bias_act" not in plan.OPS[implementation.__name__.rpartition(".")[2]]:
            pytest.skip("composed of others")
        weight = as_multiplied((torch.randn(filters, 3, 7, 7) / 147**0.5).to(dtype))
        bias = torch.randn(filters) if bias else None
        n, _, h, w = x.shape
        size = ((h + 3) // 4, (w + 3) // 4) if pool else ((h + 1) // 2, (w + 1) // 2)
        z = torch.empty((n, filters, *size), dtype=dtype, memory_format=LAST)
        implementation.stem_bias_act(x, weight, bias, mean, std, pool, z)

        def behind(y):
            u = F.relu(y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1))
            return F.max_pool2d(u, 3, 2, 1) if pool else u

        image = x.float()
        if mean is not None:
            image = (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        image = as_multiplied(image.to(dtype))
        exact = behind(convolve(image.double(), weight.double()))
        assert_close_to_reference(z, behind(convolve(image, weight)), exact, name="z")

    # several tiles of the pool across and down for each block
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype, implementation, multiprocessors):
        multiprocessors(1)
        self.check(implementation, as_multiplied(torch.randn(1, 3, 33, 30)), 24, dtype)

    @pytest.mark.parametrize("size", [*SIZES, (5, 5)], ids=str)
    def test_borders(self, size, implementation):
        self.check(implementation, torch.randn(1, 3, *size), 8, torch.float16)

    def test_without_the_pool(self, implementation):
        self.check(implementation, torch.randn(2, 3, 11, 34), 72, torch.bfloat16, pool=False)

    def test_a_tail_of_filters(self, implementation):
        self.check(implementation, torch.randn(1, 3, 9, 12), 72, torch.bfloat16, bias=False)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "channels_last"])
    def test_bytes_are_normalised(self, layout, implementation):
        x = torch.randint(0, 256, (1, 3, 18, 21), dtype=torch.uint8).to(memory_format=layout)
        self.check(implementation, x, 16, torch.float16, mean=MEAN, std=STD)

    def test_nan(self, implementation):
        x, weight = torch.randn(1, 3, 40, 40), torch.ones(8, 3, 7, 7)
        x[0, 1, 20, 20] = torch.nan
        if "stem_bias_act" not in plan.OPS[implementation.__name__.rpartition(".")[2]]:
            pytest.skip("composed of others")
        z = torch.empty((1, 8, 10, 10), dtype=torch.bfloat16, memory_format=LAST)
        implementation.stem_bias_act(x, weight, None, None, None, True, z)
        exact = F.max_pool2d(F.relu(convolve(x, weight)), 3, 2, 1)
        assert z[exact.isnan()].isnan().all() and exact.isnan().any()
        assert z.isnan().sum() <= exact.isnan().sum() + 8 * 3  # a column on the right
