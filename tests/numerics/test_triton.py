"""The CUDA kernel and the compiler's CUDA code, as far as they can be checked without a GPU, and on one."""

import collections
import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quantpatch.numerics.backends import select
from quantpatch.numerics.backends import triton as backend
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS
from quantpatch.numerics.qparams import QParams

triton = pytest.importorskip("triton", reason="Triton is for Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from quantpatch.numerics.backends.triton_kernel import round_trip_kernel  # noqa: E402

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def interpreted():
    program = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernel_equals_the_cpu_bit_for_bit(interpreted):
    cases = interpreted["cases"]
    wrong = {name: rest for name, (_, *rest) in cases.items() if any(rest)}
    assert not wrong, "elements that differ in the result, in the gradient"
    assert sum(count for count, *_ in cases.values()) > 1_000_000


def test_the_kernel_leaves_to_plain_operations_what_it_does_not_do(interpreted):
    assert interpreted["refused"] == [True] * 4


@pytest.mark.skipif(torch.__version__ < "2.12", reason="an older Triton may count subnormal quotients as 0")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_its_machine_code_rounds_each_operation_as_written(capability, dtype, name):
    floats = (4, 3) if name.startswith("fp8") else (0, 0)
    pointers = {f"{p}_pointer": f"*{dtype}" for p in "xy"} | {"inside_pointer": "*i1"}
    pointers |= {"scale_pointer": "*fp32", "amax_pointer": "*fp32", "zero_point_pointer": "*u8"}
    numbers = dict.fromkeys(("count", "row", "scales"), "i32")
    constants = {
        "exponent_bits": floats[0], "mantissa_bits": floats[1], "masked": True,
        "has_zero_point": False, "has_amax": True, "one_amax": True, "short_row": 0, "block": 1024,
    }  # fmt: skip
    numbers |= dict.fromkeys(("low", "high", "lower_end", "steps"), "fp32")
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = ASTSource(round_trip_kernel, signature, constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    found = collections.Counter(re.findall(r"^\s*(?:@\S+ )?([a-z]\w*\.[a-z0-9_.:]+)\s", ptx, re.MULTILINE))
    each = 8  # elements a thread has
    assert found["div.rn.f32"] == each
    assert not [op for op in found if "ftz" in op or "approx" in op or op.startswith(("div.full", "rcp"))]
    # Contracted are only q * scale + 0 of integers and, of floats, sums with a power of two.
    assert found["fma.rn.f32"] == (2 * each if floats[0] else each)
    # One product is the lower end of the range.
    assert found["mul.f32"] == (each if floats[0] else 0) + 1
    if dtype != "fp32":
        assert found[f"cvt.rn.{dtype.replace('p', '')}x2.f32"] == each // 2
    assert found["ld.global.v4.b32"] == found["st.global.v4.b32"] == (2 if dtype == "fp32" else 1)


def inductors_cuda_code(function, *arguments):
    """The Triton code that torch.compile generates for CUDA tensors, on a machine without a GPU."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V

    properties = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    stand_ins = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_device_properties": lambda *_: mock.Mock(multi_processor_count=132, major=9),
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda _: properties,
        "torch._inductor.codegen.triton.TritonKernel.inductor_meta_common": classmethod(lambda _: {}),
        "torch._inductor.scheduler.has_triton": lambda: True,
    }
    with contextlib.ExitStack() as stack, FakeTensorMode() as mode:
        made = [torch.empty(shape, device="cuda") for shape in arguments]
        stack.enter_context(mock.patch("torch.compiler.is_compiling", return_value=True))
        graph = make_fx(torch.func.functionalize(function), select_decomp_table(), "real")(*made)
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch(name, value))
        lowering = GraphLowering(graph)
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        lowering.run(*made)
        return lowering.codegen()[0].value


@pytest.mark.skipif(torch.__version__ < "2.12", reason="older compilers may divide approximately for CUDA")
@pytest.mark.filterwarnings("ignore")
def test_compiled_for_cuda_it_divides_exactly_and_fuses_with_its_neighbours():
    def function(x, amax):
        return fake_quantize(torch.relu(x), amax, BUILTIN_FORMATS["int8"]) + 1

    code = inductors_cuda_code(function, (1000, 512), ())
    kernels = re.findall(r"^def (triton_\w+)\(", code, re.MULTILINE)
    assert len(kernels) == 1
    body = code[code.index(f"def {kernels[0]}(") : code.index("''', device_str")]
    assert body.count(".maximum(") == 2  # relu and clamp
    assert body.count("triton.language.div_rn(") == 2  # of the range, of the values
    assert not re.findall(r"tmp\d+ / ", body)
    assert not re.findall(r"\* +0\.0078", body)  # no reciprocal of 127


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where the kernel cannot work")
def test_a_kernel_that_does_not_work_is_reported_and_plain_operations_stand_in():
    with pytest.warns(RuntimeWarning, match="CUDA kernel does not work here"):
        assert not backend._works.__wrapped__(0)


# --- On a GPU ---------------------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("name", ["int8", "uint8", "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4", "int4_g128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_results_and_gradients_equal_the_cpus(name, dtype, compiled):
    from triton_interpreted import hard_values

    number_format = BUILTIN_FORMATS[name]
    function = torch.compile(fake_quantize, fullgraph=True) if compiled else fake_quantize
    x = torch.cat([hard_values(2.7 / number_format.max, number_format.max, torch.float32)] * 20)
    x = x[x.isfinite()].to(dtype)
    x = x[x.isfinite()][: x.numel() // 256 * 256].view(-1, 256)
    ranges = [None]
    if number_format.block_size is None:
        ranges += [torch.tensor(2.7), torch.rand(x.shape[0], 1) + 0.1]
    for amax in ranges:
        axis = 0 if amax is not None and amax.dim() else None
        here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
        a = fake_quantize(here, amax, number_format, axis=axis)
        b = function(there, None if amax is None else amax.cuda(), number_format, axis=axis)
        assert torch.equal(a, b.cpu())
        for t in (a, b):
            t.backward(torch.ones_like(t))
        assert torch.equal(here.grad, there.grad.cpu())


@on_cuda
@pytest.mark.parametrize("masked", [True, False])
def test_on_a_gpu_the_kernel_is_used_and_keeps_one_byte_an_element_at_most(masked):
    x = torch.randn(1000, 999, device="cuda", requires_grad=True)
    assert select(x, QParams(BUILTIN_FORMATS["int8"], torch.tensor(1.0))) is backend
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        fake_quantize(x, torch.tensor(1.0, device="cuda") if masked else None, BUILTIN_FORMATS["int8"])
    assert sum(saved) <= masked * x.numel()
