"""Channel gather against fancy indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polarfast.kernels.gather import gather_channels

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def weight_of(shape, dtype=torch.float32):
    weight = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    return weight.to(dtype)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.dtype.itemsize == 1:  # float8 has no equality of its own
        got, want = got.view(torch.uint8), want.contiguous().view(torch.uint8)
    return got.shape == want.shape and torch.equal(got, want)


def fancy(weight, out_index, in_index):
    bits = weight.view(torch.uint8) if weight.dtype.itemsize == 1 else weight
    bits = bits if out_index is None else bits[out_index]
    bits = bits if in_index is None else bits[:, in_index]
    return bits.view(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(), (1,), (3,), (3, 3), (1, 1), (2, 3, 3)], ids=str)
def test_all_dtypes_and_ranks(dtype, kernel):
    weight = weight_of((8, 6, *kernel), dtype)
    out_index, in_index = torch.tensor([0, 3, 4, 7]), torch.tensor([1, 2, 5])
    for out, into in ((out_index, in_index), (out_index, None), (None, in_index), (None, None)):
        got = gather_channels(weight, out, into)
        assert got.dtype == dtype and got.is_contiguous()
        assert same(got, fancy(weight, out, into))
        assert got.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors(dtype):
    weight = weight_of((9,), dtype)
    index = torch.tensor([8, 0, 0, 5])
    assert same(gather_channels(weight, index), fancy(weight, index, None))
    with pytest.raises(RuntimeError, match="1-D weight has no input channels"):
        gather_channels(weight, None, index)


@st.composite
def cases(draw):
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 7)) for _ in range(2)]
    shape += [draw(st.integers(1, 3)) for _ in range(rank - 2)]
    indices = [
        draw(st.none() | st.lists(st.integers(0, size - 1), max_size=9).map(torch.LongTensor))
        for size in shape[:2]
    ]
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    return shape, *indices, layout


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_index_and_layout(case):
    """Repeated, unsorted, empty and full indices; strides of every kind."""
    shape, out_index, in_index, layout = case
    weight = weight_of(shape)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if layout == "channels_last" and channels_last is not None:
        weight = weight.to(memory_format=channels_last)
    elif layout == "transposed":
        weight = weight_of([shape[1], shape[0], *shape[2:]]).transpose(0, 1)
    elif layout == "sliced":
        weight = weight_of([shape[0], 2 * shape[1], *shape[2:]])[:, ::2]
    got = gather_channels(weight, out_index, in_index)
    assert torch.equal(got, fancy(weight, out_index, in_index))
    if layout == "channels_last" and channels_last is not None:
        assert got.is_contiguous(memory_format=channels_last)
    else:
        assert got.is_contiguous()


@pytest.mark.parametrize("rank", [4, 5])
def test_channels_last_is_kept_for_pointwise_kernels_too(rank):
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[rank]
    shape = (8, 6, *[1] * (rank - 2))
    weight = torch.empty(shape, memory_format=memory_format).copy_(weight_of(shape))
    got = gather_channels(weight, torch.tensor([1, 2]), torch.tensor([0, 5]))
    wanted = torch.empty((2, 2, *shape[2:]), memory_format=memory_format)
    assert got.stride() == wanted.stride()


def test_transposed_convolution():
    """Its weight is [in, out / groups, ...]: the caller swaps the indices."""
    conv = torch.nn.ConvTranspose2d(6, 4, 3)
    ins, outs = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    small = torch.nn.ConvTranspose2d(3, 2, 3)
    with torch.no_grad():
        small.weight.copy_(gather_channels(conv.weight.detach(), ins, outs))
        small.bias.copy_(gather_channels(conv.bias.detach(), outs))
        x = torch.zeros(1, 6, 5, 5)
        x[:, ins] = torch.rand(1, 3, 5, 5)
        torch.testing.assert_close(small(x[:, ins]), conv(x)[:, outs])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_weights_on_several_threads(threads):
    weight = torch.rand(300, 200, 3, 3)
    out_index, in_index = torch.randperm(300)[:170], torch.arange(20, 180)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gather_channels(weight, out_index, in_index)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, weight[out_index][:, in_index])


@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**63)])
@pytest.mark.parametrize("position", [0, 2])
def test_index_out_of_range_is_refused_and_named(bad, position):
    index = [1, 2, 3]
    index[position] = bad
    with pytest.raises(RuntimeError, match=rf"in_index\[{position}\] is {bad}, outside"):
        gather_channels(torch.rand(6, 6), None, torch.tensor(index))


@pytest.mark.parametrize(
    "index", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0], dtype=torch.int32)]
)
def test_index_of_another_kind_is_refused(index):
    with pytest.raises(RuntimeError, match="out_index must be a 1-D int64 tensor"):
        gather_channels(torch.rand(3, 3), index)


def test_strided_index_is_read_right():
    index = torch.arange(8)[::2]
    weight = torch.rand(8, 3)
    assert torch.equal(gather_channels(weight, index), weight[index])


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format):
    weight = torch.rand(6, 4, 3, 3).to(memory_format=memory_format)
    for arguments in (
        (weight, torch.tensor([0, 2, 5]), torch.tensor([1, 3])),
        (weight, None, torch.tensor([1, 3])),
        (weight, torch.tensor([], dtype=torch.int64), None),
        (weight.transpose(0, 1), torch.tensor([0, 2]), None),
    ):
        torch.library.opcheck(torch.ops.polarfast.gather_channels.default, arguments)


def test_compiles_without_a_graph_break():
    weight, out_index, in_index = torch.rand(6, 4, 3, 3), torch.tensor([0, 5]), torch.tensor([1])
    compiled = torch.compile(
        lambda *a: gather_channels(*a) + 1, fullgraph=True, backend="aot_eager"
    )
    want = weight[out_index][:, in_index] + 1
    assert torch.equal(compiled(weight, out_index, in_index), want)
